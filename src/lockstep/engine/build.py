"""Building a rank: weights, pool, scheduler, executor, checked by a first small step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.choice import choose_backend
from lockstep.config import EngineConfig, ModelFacts
from lockstep.core.probe import Probe
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.engine.core import EngineCore
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.memory import MemoryLine, pages_that_fit
from lockstep.executor.null import NullExecutor
from lockstep.executor.runner import Executor, ModelRunner
from lockstep.executor.threads import ThreadGovernor
from lockstep.features.grammar import GrammarCompiler
from lockstep.features.structured import StructuredOutput
from lockstep.formats import ModelFiles
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, Slice, Weights
from lockstep.models.loading.sources import StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.models.registry import model_class
from lockstep.ops.selection import Binding, KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.scheduler import Scheduler
from lockstep.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with the number of weights loaded and their total."""


@dataclass(frozen=True)
class BuiltRank:
    """One rank, ready to follow a stream."""

    core: EngineCore
    num_pages: int
    bindings: tuple[Binding, ...]
    memory: tuple[MemoryLine, ...]


def build_rank(
    files: ModelFiles,
    facts: ModelFacts,
    config: EngineConfig,
    platform: Platform,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    probe: Probe | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> BuiltRank:
    """Loads this rank's weights and makes its core.

    The first small step runs every layer once, so that a misplaced reduction, a kernel that cannot run or a
    missing device library shows here and not in a request. Raises LockstepError subclasses.
    """
    platform.set_num_threads(config.device.threads)
    if platform.name == "null":
        core = EngineCore(
            _scheduler(files, config, _num_pages_configured(config)), NullExecutor(facts.vocab_size)
        )
        return BuiltRank(core, _num_pages_configured(config), (), ())
    device = platform.device(mesh.rank("tp"))
    stored = StoredWeights(FileWeights(files))
    governor = ThreadGovernor(config.device.threads, platform.set_num_threads)
    build = Build(
        mesh=mesh,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        kv_dtype=getattr(torch, config.cache.kv_cache_dtype),
        weights=_GovernedWeights(stored, governor),
        kernels=kernel_selector(config, platform),
        context_length=config.model.context_length,
        page_size=config.cache.page_size,
        probe=probe,
        on_weight=_counter(len(files.tensors), progress),
    )
    with torch.inference_mode():
        model = model_class(files.config).make(build, files.config)
    if mesh.rank("tp") == 0:
        # Some weights belong to the first rank alone, such as the bias of a product whose terms are summed.
        stored.require_all_used()
    sample = bind_sampling(build, facts.vocab_size)
    attention, attends = bind_attention(config, platform, build)

    def runner_with(num_pages: int, hooks: Sequence[SamplerHook]) -> tuple[ModelRunner, KVPool]:
        pool = KVPool(
            tuple(build.kv_layers),
            num_pages=num_pages,
            page_size=config.cache.page_size,
            dtype=build.kv_dtype,
            allocate=lambda shape, dtype: platform.zeros(shape, dtype, mesh.rank("tp")),
        )
        runner = ModelRunner(
            model,
            pool,
            attention,
            windows=build.windows,
            eos_token_ids=files.eos_token_ids,
            device=device,
            sample=sample.function,
            hooks=hooks,
            probe=probe,
            governor=governor,
        )
        return runner, pool

    if config.cache.max_total_tokens is None:
        num_pages = _measure_pages(config, platform, mesh, build, lambda count: runner_with(count, ())[0])
    else:
        num_pages = _num_pages_configured(config)
    runner, pool = runner_with(num_pages, (StructuredOutput(GrammarCompiler(tokenizer)),))
    if check:
        first_step(runner, num_tokens=2, page_size=config.cache.page_size)
    filling = ", taken as it fills" if platform.gives_memory_on_write else ""
    pages = f"{num_pages} pages of {pool.page_size} tokens, {config.cache.kv_cache_dtype}{filling}"
    lines = (
        MemoryLine("weights", build.weight_bytes, f"{config.model.dtype}, this rank's part"),
        MemoryLine("KV pool", pool.total_bytes, pages),
    )
    core = EngineCore(_scheduler(files, config, num_pages), runner)
    bindings = (*build.kernels.bindings, *attends)
    return BuiltRank(core, num_pages, bindings, lines)


def kernel_selector(config: EngineConfig, platform: Platform) -> KernelSelector:
    """Binds kernels for the platform's device under the configuration's choices."""
    return KernelSelector(
        platform.capabilities(),
        platform.kernel_preference,
        forced=config.kernels.forced,
        strict=config.kernels.strict_kernels,
    )


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


def first_step(executor: Executor, *, num_tokens: int, page_size: int) -> None:
    """One prompt of `num_tokens` zeros through every layer, then gone. Its pages are overwritten by real ones."""
    params = SamplingParams(temperature=0.0)
    pages = tuple(range(num_tokens // page_size + 1))
    start = SequenceStart(-1, params, (0,) * num_tokens, num_tokens, 0, ())
    executor.execute(StepPlan(-2, (start,), (), (TokenSlice(-1, 0, num_tokens, pages, True),)))
    executor.execute(StepPlan(-1, (), (), (TokenSlice(-1, num_tokens, 1, (), True),)))
    executor.execute(StepPlan(-1, (), (-1,), ()))


def _measure_pages(
    config: EngineConfig,
    platform: Platform,
    mesh: Mesh,
    build: Build,
    runner_with: Callable[[int], ModelRunner],
) -> int:
    """Pages that fit beside the weights and the workspace of the largest step, the same on every rank."""
    page_size, chunk = config.cache.page_size, config.scheduler.chunked_prefill_size
    trial_tokens = min(chunk, config.model.context_length - 1)
    trial_pages = trial_tokens // page_size + 1
    before = platform.memory(mesh.rank("tp"))
    runner = runner_with(trial_pages)
    first_step(runner, num_tokens=trial_tokens, page_size=page_size)
    platform.synchronize()
    peak_bytes = before.available_bytes - platform.memory(mesh.rank("tp")).available_bytes
    page_bytes = sum(shape.bytes_per_token(build.kv_dtype) for shape in build.kv_layers) * page_size
    workspace_bytes = max(0, peak_bytes - page_bytes * trial_pages)
    del runner
    num_pages = pages_that_fit(
        free_bytes=before.available_bytes,
        total_bytes=before.total_bytes,
        fraction=config.cache.mem_fraction_static,
        workspace_bytes=workspace_bytes,
        page_bytes=page_bytes,
        min_pages=-(-256 // page_size),
    )
    counts = mesh.group("tp").all_gather(torch.tensor([num_pages], device=build.device), 0)
    return int(counts.min())


def _num_pages_configured(config: EngineConfig) -> int:
    tokens = config.cache.max_total_tokens or config.model.context_length
    return max(1, tokens // config.cache.page_size)


def _scheduler(files: ModelFiles, config: EngineConfig, num_pages: int) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            max_running_requests=config.scheduler.max_running_requests,
            chunk_tokens=config.scheduler.chunked_prefill_size,
            max_queued_requests=config.scheduler.max_queued_requests,
            context_length=config.model.context_length,
            page_size=config.cache.page_size,
            num_pages=num_pages,
            policy="priority" if config.scheduler.schedule_policy == "priority" else "fcfs",
            eos_token_ids=files.eos_token_ids,
            enable_prefix_cache=not config.cache.disable_radix_cache,
        )
    )


def _counter(total: int, progress: Progress | None) -> Callable[[str, int], None] | None:
    if progress is None:
        return None
    loaded: set[str] = set()

    def count(name: str, num_bytes: int) -> None:
        loaded.add(name)
        progress(min(len(loaded), total), total)

    return count
