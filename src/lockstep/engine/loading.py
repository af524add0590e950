"""From files and a configuration to a model on a rank, with the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.choice import attention_inside, check_backend, choose_backend
from lockstep.attention.span_backend import SpanBackend
from lockstep.config import EngineConfig, ModelFacts
from lockstep.core.probe import Probe
from lockstep.executor.fused import FewRowsFused, fuse
from lockstep.executor.sampler import SamplingKernels
from lockstep.executor.threads import SHARING_FULL_SHARE, ThreadGovernor
from lockstep.layers.build import Build, Place, Slice, Weights, fill_places
from lockstep.models.llm.decoder import DecoderModel
from lockstep.models.registry import model_class
from lockstep.ops.background import BackgroundCompiler
from lockstep.ops.contract import Kernel
from lockstep.ops.decoder_decode.signature import signature_of
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.registry import require_providers
from lockstep.ops.selection import Binding, KernelSelector, require_served
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform
from lockstep.quantization.held import QUANTISERS

OnWeight = Callable[[str, int], None]


@dataclass(frozen=True)
class BoundModel:
    """A model with a kernel at every call site. `whole` is the one that computes all blocks, `few_rows` the one that
    does so in steps of a few single tokens, where there is one."""

    model: DecoderModel
    whole: Binding | None
    few_rows: Binding | None
    attention: AttentionBackend
    sampling: SamplingKernels
    copy_words: Kernel
    bindings: tuple[Binding, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, what its steps need, and every decision about its kernels."""

    build: Build
    model: DecoderModel
    attention: AttentionBackend
    sampling: SamplingKernels
    copy_words: Kernel
    governor: ThreadGovernor
    bindings: tuple[Binding, ...]
    background: BackgroundCompiler | None


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
    background = _background(config, platform, mesh)
    build = new_build(
        config,
        platform.device(mesh.everyone.rank),
        mesh,
        _GovernedWeights(weights, governor),
        platform,
        probe,
        on_weight,
        background=background,
    )
    bound = bind_model(build, facts, settings, config, platform, compile_ahead=True)
    model = bound.model
    if bound.whole is not None:
        model = fused = fuse(bound.model, bound.whole)
        # The kernel has threads of its own; torch's would spin beside them.
        platform.set_num_threads(1)
        fused.set_num_threads(config.device.threads)
        governor = ThreadGovernor(config.device.threads, fused.set_num_threads, full_share=SHARING_FULL_SHARE)
    elif bound.few_rows is not None:
        model = FewRowsFused(bound.model, bound.few_rows.kernel)
    return LoadedModel(
        build, model, bound.attention, bound.sampling, bound.copy_words, governor, bound.bindings, background
    )


def bind_model(
    build: Build,
    facts: ModelFacts,
    settings: Mapping[str, Any],
    config: EngineConfig,
    platform: Platform,
    *,
    compile_ahead: bool = False,
) -> BoundModel:
    """Makes the model's layers over the build's weights and binds a kernel at every call site.

    With `compile_ahead`, kernels of attention that are compiled once for a machine are, where that is still to do.
    Raises ModelFileError; ConfigError for an attention backend that is not there; KernelError where no kernel serves,
    or where one that was forced would serve nothing.
    """
    whole = bind_whole(build, facts, settings, config)
    with torch.inference_mode():
        model = model_class(settings).make(build, settings)
    num_sites = len(build.kernels.bindings)
    attention: AttentionBackend
    few_rows = None
    if whole is None:
        attention, attends = bind_attention(config, platform, build, compile_ahead=compile_ahead)
        few_rows = bind_few_rows(build, model, config, attention)
    else:
        attention, attends = SpanBackend(), attention_inside(whole)
    # A kernel of a whole decoder gives scores in float32, bare ones too.
    sampling = bind_sampling(build, facts.vocab_size, build.dtype if whole is None else torch.float32)
    copy_words = build.bind("copy_words", "rows and tokens of a step", dtype=torch.int32).kernel
    sites, others = build.kernels.bindings[:num_sites], build.kernels.bindings[num_sites:]
    if whole is not None:
        sites = [whole, *(site.inside(whole) for site in sites if site is not whole)]
    bindings = (*sites, *attends, *others)
    require_served(config.kernels.forced, bindings)
    return BoundModel(model, whole, few_rows, attention, sampling, copy_words, bindings)


def new_build(
    config: EngineConfig,
    device: torch.device,
    mesh: Mesh,
    weights: Weights,
    platform: Platform,
    probe: Probe | None = None,
    on_weight: OnWeight | None = None,
    selector: type[KernelSelector] = KernelSelector,
    background: BackgroundCompiler | None = None,
) -> Build:
    """What the layers of a model are made with under this configuration; `selector` binds their kernels."""
    return Build(
        mesh=mesh,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        kv_dtype=getattr(torch, config.cache.kv_cache_dtype),
        weights=weights,
        kernels=kernel_selector(config, platform, selector, background),
        context_length=config.model.context_length,
        page_size=config.cache.page_size,
        keep_grouped=config.model.quantization not in ("none", "bf16"),
        quantise=QUANTISERS.get(config.model.quantization),
        probe=probe,
        on_weight=on_weight,
    )


def kernel_selector(
    config: EngineConfig,
    platform: Platform,
    selector: type[KernelSelector] = KernelSelector,
    background: BackgroundCompiler | None = None,
) -> KernelSelector:
    """Binds kernels for the platform's device under the configuration's choices; see KernelSelector.

    Raises KernelError where the platform prefers kernels that nobody has.
    """
    preferred = (*platform.kernel_preference, *platform.attention_preference, *platform.extend_preference)
    require_providers(platform.name, preferred)
    return selector(
        platform.capabilities(),
        platform.kernel_preference,
        forced=config.kernels.forced,
        strict=config.kernels.strict_kernels,
        measured_in=config.kernels.measured_in,
        background=background,
    )


def _background(config: EngineConfig, platform: Platform, mesh: Mesh) -> BackgroundCompiler | None:
    """The first rank compiles for all: their devices are alike, and so is the folder."""
    rank = mesh.everyone.rank
    return BackgroundCompiler(platform.device(rank), config.kernels.measured_in) if rank == 0 else None


def bind_whole(
    build: Build, facts: ModelFacts, settings: Mapping[str, Any], config: EngineConfig
) -> Binding | None:
    """The kernel for all blocks together; None where the layers are to run one by one.

    Raises ConfigError for an attention backend that is not known, whether or not one is needed.
    """
    backend = config.kernels.attention_backend
    if backend is not None:
        check_backend(backend)
    if not model_class(settings).has_outline:
        return None
    signature = {
        "pool_dtype": build.kv_dtype,
        "head_dim": facts.head_dim,
        "inner_size": int(settings.get("intermediate_size") or 0),
        "num_ranks": build.mesh.group("tp").size,
    }
    apart = None
    if build.probe is not None:
        apart = "a probe watches what lies between"
    elif backend is not None:
        apart = f"--attention-backend {backend} asks for attention by itself"
    whole = build.bind_fused("decoder_forward", "all blocks", apart=apart, **signature)
    if whole is not None:
        build.norm_dtype = torch.float32
    return whole


def bind_few_rows(
    build: Build, model: DecoderModel, config: EngineConfig, attention: AttentionBackend
) -> Binding | None:
    """The kernel for all blocks of a few single tokens; None where those run layer by layer, too."""
    if not model.has_outline:
        return None
    apart = None
    if build.probe is not None:
        apart = "a probe watches what lies between"
    elif config.kernels.attention_backend is not None:
        apart = f"--attention-backend {config.kernels.attention_backend} asks for attention by itself"
    elif not attention.has_tables:
        apart = f"attention by {attention.name} has no page tables on the device"
    signature = signature_of(
        model.outline(), build.dtype, build.kv_dtype, build.page_size, build.mesh.everyone.size
    )
    return build.kernels.bind_fused("decoder_decode", "few single tokens", signature, apart=apart)


def bind_attention(
    config: EngineConfig, platform: Platform, build: Build, *, compile_ahead: bool = False
) -> tuple[AttentionBackend, tuple[Binding, ...]]:
    """The attention backend for the layers that a model registered, and the decisions as bindings.

    With `compile_ahead`, kernels that are compiled once for a machine are, where that is still to do.
    """
    return choose_backend(
        config.kernels.attention_backend or "auto",
        build.kernels,
        platform.attention_preference,
        build.attention_signature,
        extend_preference=platform.extend_preference,
        compile_ahead=compile_ahead,
        fresh_signature=build.fresh_signature,
    )


def bind_sampling(build: Build, vocab_size: int, bare_dtype: torch.dtype) -> SamplingKernels:
    """The kernels that choose tokens from float32 scores, and from those that stay as the model gives them."""
    argmax, sample, bare_argmax = (
        build.bind(op, where, dtype=dtype, vocab_size=vocab_size).kernel
        for op, where, dtype in (
            ("argmax", "sampler", torch.float32),
            ("top_k_top_p_sample", "sampler", torch.float32),
            ("argmax", "sampler, bare scores", bare_dtype),
        )
    )
    choose_greedy = build.bind_fused(
        "choose_greedy", "sampler, bare scores", dtype=bare_dtype, vocab_size=vocab_size
    )
    return SamplingKernels(argmax, sample, bare_argmax, None if choose_greedy is None else choose_greedy.kernel)


class _GovernedWeights:
    """Weights that are read and expanded on as many threads as the cores allow right now."""

    def __init__(self, source: Weights, governor: ThreadGovernor) -> None:
        self._source = source
        self._governor = governor

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: Slice | None) -> torch.Tensor:
        with self._governor.step():
            return self._source.load(name, shape, dtype, part)

    def fill(self, places: Sequence[Place]) -> None:
        with self._governor.step():
            fill_places(self._source, places)

    def load_grouped(self, name: str, shape: tuple[int, ...], part: Slice | None) -> GroupedWeight | None:
        with self._governor.step():
            return self._source.load_grouped(name, shape, part)
