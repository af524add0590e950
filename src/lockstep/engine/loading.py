"""From files and a configuration to a model on a rank, with the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.choice import choose_backend
from lockstep.attention.span_backend import SpanBackend
from lockstep.config import EngineConfig, ModelFacts
from lockstep.core.probe import Probe
from lockstep.executor.fused import fuse
from lockstep.executor.threads import SHARING_FULL_SHARE, ThreadGovernor
from lockstep.layers.build import Build, Slice, Weights
from lockstep.models.llm.decoder import DecoderModel
from lockstep.models.registry import model_class
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.selection import Binding, KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform
from lockstep.quantization.held import QUANTISERS

OnWeight = Callable[[str, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, what its steps need, and every decision about its kernels."""

    build: Build
    model: DecoderModel
    attention: AttentionBackend
    sample: Binding
    governor: ThreadGovernor
    bindings: tuple[Binding, ...]


def load_model(
    facts: ModelFacts,
    settings: Mapping[str, Any],
    config: EngineConfig,
    platform: Platform,
    mesh: Mesh,
    weights: Weights,
    *,
    probe: Probe | None = None,
    on_weight: OnWeight | None = None,
) -> LoadedModel:
    """Makes the model of `settings` (a config.json) with its weights on this rank's device.

    Raises ModelFileError, KernelError or ConfigError.
    """
    governor = ThreadGovernor(config.device.threads, platform.set_num_threads)
    build = new_build(
        config,
        platform.device(mesh.everyone.rank),
        mesh,
        _GovernedWeights(weights, governor),
        platform,
        probe,
        on_weight,
    )
    whole = bind_whole(build, facts, settings)
    with torch.inference_mode():
        model = model_class(settings).make(build, settings)
    sample = bind_sampling(build, facts.vocab_size)
    if whole is not None:
        fused = fuse(model, whole)
        # The kernel has threads of its own; torch's would spin beside them.
        platform.set_num_threads(1)
        fused.set_num_threads(config.device.threads)
        governor = ThreadGovernor(config.device.threads, fused.set_num_threads, full_share=SHARING_FULL_SHARE)
        return LoadedModel(build, fused, SpanBackend(), sample, governor, tuple(build.kernels.bindings))
    attention, attends = bind_attention(config, platform, build)
    return LoadedModel(build, model, attention, sample, governor, (*build.kernels.bindings, *attends))


def new_build(
    config: EngineConfig,
    device: torch.device,
    mesh: Mesh,
    weights: Weights,
    platform: Platform,
    probe: Probe | None = None,
    on_weight: OnWeight | None = None,
) -> Build:
    """What the layers of a model are made with under this configuration."""
    return Build(
        mesh=mesh,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        kv_dtype=getattr(torch, config.cache.kv_cache_dtype),
        weights=weights,
        kernels=kernel_selector(config, platform),
        context_length=config.model.context_length,
        page_size=config.cache.page_size,
        keep_grouped=config.model.quantization not in ("none", "bf16"),
        quantise=QUANTISERS.get(config.model.quantization),
        probe=probe,
        on_weight=on_weight,
    )


def kernel_selector(config: EngineConfig, platform: Platform) -> KernelSelector:
    """Binds kernels for the platform's device under the configuration's choices."""
    return KernelSelector(
        platform.capabilities(),
        platform.kernel_preference,
        forced=config.kernels.forced,
        strict=config.kernels.strict_kernels,
    )


def bind_whole(build: Build, facts: ModelFacts, settings: Mapping[str, Any]) -> Binding | None:
    """The kernel for all blocks together; None where the layers are to run one by one."""
    if build.probe is not None or not model_class(settings).has_outline:
        return None
    signature = {
        "dtype": build.dtype,
        "pool_dtype": build.kv_dtype,
        "head_dim": facts.head_dim,
        "inner_size": int(settings.get("intermediate_size") or 0),
        "num_ranks": build.mesh.group("tp").size,
    }
    binding = build.kernels.bind("decoder_forward", "all blocks", signature, strict=False)
    if binding.kernel.prepare is None:
        return None
    build.norm_dtype = torch.float32
    return binding


def bind_attention(
    config: EngineConfig, platform: Platform, build: Build
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """The attention backend for the layers that a model registered, and the decisions as bindings."""
    return choose_backend(
        config.kernels.attention_backend or "auto",
        platform.capabilities(),
        platform.attention_preference,
        build.attention_signature,
        forced=config.kernels.forced,
        strict=config.kernels.strict_kernels,
    )


def bind_sampling(build: Build, vocab_size: int) -> Binding:
    """The kernel that draws tokens from float32 scores."""
    return build.bind("top_k_top_p_sample", "sampler", dtype=torch.float32, vocab_size=vocab_size)


class _GovernedWeights:
    """Weights that are read and expanded on as many threads as the cores allow right now."""

    def __init__(self, source: Weights, governor: ThreadGovernor) -> None:
        self._source = source
        self._governor = governor

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        with self._governor.step():
            return self._source.load(name, shape, dtype, part)

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> GroupedWeight | None:
        with self._governor.step():
            return self._source.load_grouped(name, shape, part)
