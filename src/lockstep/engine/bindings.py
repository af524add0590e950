"""Which kernels a model would run with, known from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lockstep.engine.loading import bind_attention, bind_sampling, bind_whole, new_build
from lockstep.engine.opening import open_for_running
from lockstep.models.loading.sources import ShapeWeights
from lockstep.models.loading.weights import FileWeights
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
    settings = opened.files.config
    mesh = Mesh.shapes_only(config.parallel.mesh_sizes, rank=0)
    weights = ShapeWeights(FileWeights(opened.files))
    build = new_build(config, load_platform("null").device(), mesh, weights, opened.platform)
    whole = bind_whole(build, opened.facts, settings)
    with torch.inference_mode():
        model_class(settings).make(build, settings)
    bind_sampling(build, opened.facts.vocab_size)
    if whole is not None:
        return tuple(build.kernels.bindings)
    _, attends = bind_attention(config, opened.platform, build)
    return (*build.kernels.bindings, *attends)
