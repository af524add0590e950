"""Building a rank: weights, pool, scheduler, executor, checked by a first small step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.config import EngineConfig, ModelFacts
from lockstep.core.probe import Probe
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.engine.core import EngineCore
from lockstep.engine.loading import LoadedModel, load_model
from lockstep.engine.runners import Runners
from lockstep.executor.memory import MemoryLine, pages_that_fit
from lockstep.executor.null import NullExecutor
from lockstep.executor.runner import Executor, ModelRunner
from lockstep.features.grammar import GrammarCompiler
from lockstep.features.structured import StructuredOutput
from lockstep.formats import ModelFiles
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build
from lockstep.models.loading.sources import StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.ops.selection import Binding
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
    stored = StoredWeights(FileWeights(files))
    loaded = load_model(
        facts,
        files.config,
        config,
        platform,
        mesh,
        stored,
        probe=probe,
        on_weight=_counter(len(files.tensors), progress),
    )
    if mesh.everyone.rank == 0:
        # Some weights belong to the first rank alone, such as the bias of a product whose terms are summed.
        stored.require_all_used(but=loaded.build.left_to_others)
    runners = Runners(loaded, config, platform, mesh, files.eos_token_ids, probe)
    if config.cache.max_total_tokens is None:
        num_pages = _measure_pages(config, platform, mesh, loaded.build, runners.trial)
    else:
        num_pages = _num_pages_configured(config)
    runner, pool = runners.serving(num_pages, (StructuredOutput(GrammarCompiler(tokenizer)),))
    if check:
        first_step(runner, num_tokens=2, page_size=config.cache.page_size)
    core = EngineCore(_scheduler(files, config, num_pages), runner)
    return BuiltRank(
        core, num_pages, loaded.bindings, _memory_lines(config, platform, loaded, pool, runners.no_graphs)
    )


def _memory_lines(
    config: EngineConfig, platform: Platform, loaded: LoadedModel, pool: KVPool, no_graphs: str | None
) -> tuple[MemoryLine, ...]:
    filling = ", taken as it fills" if platform.gives_memory_on_write else ""
    pages = f"{pool.num_pages} pages of {pool.page_size} tokens, {config.cache.kv_cache_dtype}{filling}"
    held = {"none": config.model.dtype, "stored": "as stored"}.get(
        config.model.quantization, config.model.quantization
    )
    lines = [
        MemoryLine("weights", loaded.build.weight_bytes, f"{held}, this rank's part"),
        MemoryLine("KV pool", pool.total_bytes, pages),
    ]
    if no_graphs and config.kernels.graphs != "off":
        lines.append(MemoryLine("graphs", 0, f"none: {no_graphs}"))
    return tuple(lines)


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
    before = platform.memory(mesh.everyone.rank)
    runner = runner_with(trial_pages)
    first_step(runner, num_tokens=trial_tokens, page_size=page_size)
    platform.synchronize()
    peak_bytes = before.available_bytes - platform.memory(mesh.everyone.rank).available_bytes
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
    counts = mesh.everyone.all_gather(torch.tensor([num_pages], device=build.device), 0)
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
