"""Which kernels a model would run with, known from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lockstep.engine.build import bind_attention, bind_sampling, kernel_selector
from lockstep.engine.opening import open_for_running
from lockstep.layers.build import Build
from lockstep.models.loading.sources import ShapeWeights
from lockstep.models.registry import model_class
from lockstep.ops.selection import Binding
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform


def explain_bindings(options: Mapping[str, Any]) -> tuple[Binding, ...]:
    """Every call site of the first rank with its kernel, and why; no weight is read and nothing is computed.

    The model is built from shapes with the selector that a real build on the same device has. `options` are those of
    the engine. Raises what opening or building the model would: KernelError for a refused fallback, ConfigError...
    """
    opened = open_for_running(options)
    config = opened.config
    build = Build(
        mesh=Mesh.shapes_only("tp", rank=0, size=config.parallel.tp) if config.parallel.tp > 1 else Mesh.solo(),
        device=load_platform("null").device(),
        dtype=getattr(torch, config.model.dtype),
        kv_dtype=getattr(torch, config.cache.kv_cache_dtype),
        weights=ShapeWeights(),
        kernels=kernel_selector(config, opened.platform),
        context_length=config.model.context_length,
        page_size=config.cache.page_size,
    )
    with torch.inference_mode():
        model_class(opened.files.config).make(build, opened.files.config)
    bind_sampling(build, opened.facts.vocab_size)
    _, attends = bind_attention(config, opened.platform, build)
    return (*build.kernels.bindings, *attends)
