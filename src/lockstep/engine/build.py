"""Building a rank: weights, pool, scheduler, executor, checked by a first small step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.config import EngineConfig, ModelFacts
from lockstep.config.memory import human_bytes
from lockstep.core.errors import OutOfMemory
from lockstep.core.probe import Probe
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import Executor, SequenceStart, StepPlan, TokenSlice
from lockstep.engine.core import EngineCore
from lockstep.engine.loading import load_model
from lockstep.engine.runners import Runners
from lockstep.engine.sizing import Sizing
from lockstep.engine.weights import open_weights
from lockstep.executor.memory import MemoryLine
from lockstep.executor.null import NullExecutor
from lockstep.executor.page_copies import CopyingExecutor
from lockstep.executor.runner import ModelRunner
from lockstep.features.grammar import GrammarCompiler
from lockstep.features.structured import StructuredOutput
from lockstep.formats import ModelFiles
from lockstep.kv.pool.pool import KVPool
from lockstep.models.loading.sources import StoredWeights
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
    sizing: Sizing | None = None
    pool: KVPool | None = None

    def memory_lines(self, *, measure: bool = False) -> tuple[MemoryLine, ...]:
        """Where this rank's memory goes; none on a platform that computes nothing.

        With `measure`, the largest steps are run if building had no need to: nothing else may run meanwhile.
        """
        if self.sizing is None or self.pool is None:
            return ()
        if measure:
            self.sizing.measure()
        return self.sizing.lines(self.pool)


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
        return BuiltRank(core, _num_pages_configured(config), ())
    before = platform.memory(mesh.everyone.rank)
    with open_weights(files, config, platform, mesh.everyone.rank) as weights:
        try:
            loaded = load_model(
                facts,
                files.config,
                config,
                platform,
                mesh,
                weights,
                probe=probe,
                on_weight=_counter(len(files.tensors), progress),
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(_no_room_for_weights(facts, config, before.available_bytes)) from error
        if mesh.everyone.rank == 0 and isinstance(weights, StoredWeights):
            # Some weights belong to the first rank alone, such as the bias of a product whose terms are summed.
            weights.require_all_used(but=loaded.build.left_to_others)
    runners = Runners(loaded, config, platform, mesh, files.eos_token_ids, probe)
    sizing = Sizing(facts, config, platform, mesh, loaded, runners, before)
    if config.cache.max_total_tokens is None:
        num_pages = sizing.num_pages()
    else:
        num_pages = _num_pages_configured(config)
    runner, pool = runners.serving(num_pages, (StructuredOutput(GrammarCompiler(tokenizer)),))
    if check:
        first_step(runner, num_tokens=2, page_size=config.cache.page_size)
    executor: Executor = runner
    num_host_pages = sizing.num_host_pages()
    if num_host_pages:
        executor = CopyingExecutor(runner, runners.host_pool(pool, num_host_pages))
    platform.settle()
    if loaded.background is not None:
        loaded.background.started()
    core = EngineCore(_scheduler(files, config, num_pages, num_host_pages), executor)
    return BuiltRank(core, num_pages, loaded.bindings, sizing, pool)


def _no_room_for_weights(facts: ModelFacts, config: EngineConfig, available_bytes: int) -> str:
    """What to tell when the device ran out of memory while weights were loaded, though they had seemed to fit."""
    model, parallel = config.model, config.parallel
    held_bytes = facts.held_weight_bytes(model.dtype, model.quantization, copies=parallel.ep)
    return (
        f"the weights ({human_bytes(held_bytes // parallel.num_ranks)} on each device) do not fit: "
        f"{human_bytes(available_bytes)} were free before; end what else takes the device's memory, "
        "share the weights out with --tp, or choose a smaller model"
    )


def first_step(executor: ModelRunner, *, num_tokens: int, page_size: int) -> None:
    """One prompt of `num_tokens` zeros through every layer, then gone. Its pages are overwritten by real ones."""
    params = SamplingParams(temperature=0.0)
    pages = tuple(range(num_tokens // page_size + 1))
    start = SequenceStart(-1, params, (0,) * num_tokens, num_tokens, 0, ())
    executor.execute(StepPlan(-2, (start,), (), (TokenSlice(-1, 0, num_tokens, pages, True),)))
    executor.execute(StepPlan(-1, (), (), (TokenSlice(-1, num_tokens, 1, (), True),)))
    executor.execute(StepPlan(-1, (), (-1,), ()))


def _num_pages_configured(config: EngineConfig) -> int:
    tokens = config.cache.max_total_tokens or config.model.context_length
    return max(1, tokens // config.cache.page_size)


def _scheduler(files: ModelFiles, config: EngineConfig, num_pages: int, num_host_pages: int = 0) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            max_running_requests=config.scheduler.max_running_requests,
            chunk_tokens=config.scheduler.chunked_prefill_size,
            max_queued_requests=config.scheduler.max_queued_requests,
            context_length=config.model.context_length,
            page_size=config.cache.page_size,
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            policy="priority" if config.scheduler.schedule_policy == "priority" else "fcfs",
            eos_token_ids=files.eos_token_ids,
            enable_prefix_cache=not config.cache.disable_radix_cache,
            max_plans_in_flight=2 if config.scheduler.overlap == "on" else 1,
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
