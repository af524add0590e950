"""What the largest steps of a loaded model take, how many KV pages that leaves, and what is told about memory."""

from __future__ import annotations

import torch

from lockstep.config import EngineConfig, ModelFacts
from lockstep.config.memory import SMALLEST_POOL_TOKENS
from lockstep.core.errors import OutOfMemory
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.engine.loading import LoadedModel
from lockstep.engine.runners import Runners
from lockstep.executor.memory import MemoryLine, PoolBudget, StepMemory
from lockstep.executor.runner import ModelRunner
from lockstep.kv.pool.host_pool import staging_bytes
from lockstep.kv.pool.pool import KVPool
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import MemoryFacts, Platform


class Sizing:
    """Measures on this rank, once its weights are loaded. `before` is the device's memory before they were.

    Every rank runs the same steps at the same time, for they may have to sum over ranks.
    """

    def __init__(
        self,
        facts: ModelFacts,
        config: EngineConfig,
        platform: Platform,
        mesh: Mesh,
        loaded: LoadedModel,
        runners: Runners,
        before: MemoryFacts,
    ) -> None:
        self._facts = facts
        self._config = config
        self._platform = platform
        self._mesh = mesh
        self._loaded = loaded
        self._runners = runners
        self._before = before
        self._rank = mesh.everyone.rank
        self._step: StepMemory | None = None

    def num_pages(self) -> int:
        """Pages that fit beside the weights and the largest steps, the same on every rank. Raises OutOfMemory."""
        self._platform.release_unused(self._rank)
        now = self._platform.memory(self._rank)
        budget = PoolBudget(
            free_bytes=now.available_bytes,
            total_bytes=now.total_bytes,
            fraction=self._config.cache.mem_fraction_static,
            step=self.measure(),
            page_bytes=self._page_bytes,
            weight_bytes=self._loaded.build.weight_bytes,
            chunk_tokens=self._config.scheduler.chunked_prefill_size,
            num_ranks=self._config.parallel.tp,
            possible_ranks=self._facts.valid_tp(),
        )
        return self._fewest(budget.num_pages(-(-SMALLEST_POOL_TOKENS // self._config.cache.page_size)))

    def num_host_pages(self) -> int:
        """Pages behind the pool on the host, the same on every rank."""
        if not self._host_bytes:
            return 0
        return self._fewest(self._host_bytes // self._page_bytes)

    def measure(self) -> StepMemory:
        """What the largest steps take: one of a single prompt, and one in which as many sequences as may run draw their
        next tokens. Then the largest graph, if steps are recorded. Measured once, over a small pool of its own.

        Raises OutOfMemory when they do not fit.
        """
        if self._step is not None:
            return self._step
        try:
            self._step = self._measured()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"a step of {self._chunk_tokens} tokens and {self._num_sequences} sequences does not fit beside "
                f"{self._loaded.build.weight_bytes / 2**30:.2f} GiB of weights; lower --chunked-prefill-size or "
                "--max-running-requests, or share the weights out with --tp"
            ) from error
        self._platform.release_unused(self._rank)
        return self._step

    def lines(self, pool: KVPool) -> tuple[MemoryLine, ...]:
        """Every part of this rank's memory; what was not measured is left out."""
        now, step, config = self._platform.memory(self._rank), self._step, self._config
        total_bytes, before = self._before.total_bytes, self._before
        on_host = self._platform.gives_memory_on_write
        others_bytes = max(0, total_bytes - before.available_bytes - before.held_bytes)
        others = (
            "other programs and the system" if on_host else "other programs, and the device's own for this one"
        )
        own = "this process before the weights" if on_host else "kept by the allocator before the weights"
        lines = [
            MemoryLine("others", others_bytes, others, is_own=False),
            MemoryLine("start", before.held_bytes, own),
            MemoryLine("weights", self._loaded.build.weight_bytes, f"{_held_as(config)}, this rank's part"),
            MemoryLine("KV pool", pool.total_bytes, _pages(config, pool, on_host)),
            MemoryLine(
                "page tables", self._page_table_bytes(pool), "of as many sequences as may run, at full length"
            ),
        ]
        if step is not None:
            scores_bytes = self._num_sequences * self._facts.vocab_size * 4
            lines.append(
                MemoryLine(
                    "workspace",
                    step.workspace_bytes,
                    f"measured: {self._chunk_tokens} tokens; {self._num_sequences} sequences that draw, of which "
                    f"{scores_bytes / 2**20:.0f} MiB are scores",
                )
            )
        lines += self._graph_lines(step)
        if self._host_bytes:
            lines.append(MemoryLine("host cache", self._host_bytes, "in host memory", is_own=on_host))
        lines.append(
            MemoryLine("free now", now.available_bytes, f"of {total_bytes / 2**30:.1f} GiB", is_own=False)
        )
        return tuple(lines)

    def _graph_lines(self, step: StepMemory | None) -> list[MemoryLine]:
        use = self._runners.graph_use
        if use.any and step is not None:
            note = "; ".join(("measured: the largest of each kind, whose memory all share", *use.why))
            return [MemoryLine("graphs", step.graph_bytes, note)]
        return [MemoryLine("graphs", 0, f"none: {use.why[0]}")] if use.why and not use.any else []

    def _measured(self) -> StepMemory:
        page_size = self._config.cache.page_size
        rows_each = max(1, self._chunk_tokens // self._num_sequences)
        pages_each = rows_each // page_size + 1
        num_pages = max(self._chunk_tokens // page_size + 1, self._num_sequences * pages_each)
        with self._platform.memory_use(self._rank) as use:
            runner, pool = self._runners.trial(num_pages)
            run_prompts(runner, 1, self._chunk_tokens, page_size)
            run_prompts(runner, self._num_sequences, rows_each, page_size)
        pool_bytes = pool.total_bytes
        with self._platform.memory_use(self._rank) as graphs_use:
            graphs = self._runners.record_largest(pool)
        del runner, pool, graphs
        return StepMemory(
            workspace_bytes=max(0, use.bytes - pool_bytes),
            graph_bytes=graphs_use.bytes,
            staging_bytes=staging_bytes(self._page_bytes) if self._host_bytes else 0,
        )

    def _fewest(self, count: int) -> int:
        """The smallest count of all ranks."""
        counts = self._mesh.everyone.all_gather(torch.tensor([count], device=self._loaded.build.device), 0)
        return int(counts.min())

    @property
    def _host_bytes(self) -> int:
        return int(self._config.cache.host_cache_size * 2**30)

    @property
    def _chunk_tokens(self) -> int:
        return min(self._config.scheduler.chunked_prefill_size, self._config.model.context_length - 1)

    @property
    def _num_sequences(self) -> int:
        return min(self._config.scheduler.max_running_requests, self._chunk_tokens)

    @property
    def _page_bytes(self) -> int:
        build = self._loaded.build
        page_size = self._config.cache.page_size
        return sum(shape.bytes_per_token(build.kv_dtype) for shape in build.kv_layers) * page_size

    def _page_table_bytes(self, pool: KVPool) -> int:
        pages_each = min(-(-self._config.model.context_length // pool.page_size), pool.num_pages)
        return self._config.scheduler.max_running_requests * pages_each * torch.int32.itemsize


def run_prompts(runner: ModelRunner, count: int, num_tokens: int, page_size: int) -> None:
    """`count` prompts of `num_tokens` zeros through every layer in one step, each of which draws a token, then gone.

    Their pages, the first ones of the pool, hold nothing of use afterwards.
    """
    pages_each = num_tokens // page_size + 1
    ids = range(-count, 0)
    starts = tuple(
        SequenceStart(at, SamplingParams(top_k=40, top_p=0.9, seed=0), (0,) * num_tokens, num_tokens, 0, ())
        for at in ids
    )
    slices = tuple(
        TokenSlice(at, 0, num_tokens, tuple(range(number * pages_each, (number + 1) * pages_each)), True)
        for number, at in enumerate(ids)
    )
    runner.execute(StepPlan(-2, starts, (), slices))
    runner.execute(StepPlan(-1, (), tuple(ids), ()))


def _held_as(config: EngineConfig) -> str:
    kind = config.model.quantization
    return {"none": config.model.dtype, "stored": "as stored"}.get(kind, kind)


def _pages(config: EngineConfig, pool: KVPool, on_host: bool) -> str:
    filling = ", taken as it fills" if on_host else ""
    return f"{pool.num_pages} pages of {pool.page_size} tokens, {config.cache.kv_cache_dtype}{filling}"
