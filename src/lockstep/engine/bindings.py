"""Which kernels a model would run with, known from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lockstep.engine.loading import bind_model, new_build
from lockstep.engine.opening import open_for_running
from lockstep.models.loading.sources import ShapeWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.ops.selection import Binding, passed_over
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform


def explain_bindings(options: Mapping[str, Any]) -> tuple[Binding, ...]:
    """Every call site of the first rank with its kernel, and why; no weight is read and nothing is computed.

    `refused` has every other kernel of the operator, not only the better-placed ones; nothing where the kernel of a
    larger operator computes the call site.
    The model is built from shapes with the selector that a real build on the same device has. `options` are those of
    the engine. Raises what opening or building the model would: KernelError for a refused fallback, ConfigError...
    """
    opened = open_for_running(options)
    config = opened.config
    settings = opened.files.config
    mesh = Mesh.shapes_only(config.parallel.mesh_sizes, rank=0)
    weights = ShapeWeights(FileWeights(opened.files))
    build = new_build(config, load_platform("null").device(), mesh, weights, opened.platform)
    bindings = bind_model(build, opened.facts, settings, config, opened.platform).bindings
    capabilities = opened.platform.capabilities()
    return tuple(
        replace(binding, refused=passed_over(binding, capabilities)) if binding.signature else binding
        for binding in bindings
    )
