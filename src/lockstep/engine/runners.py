"""Runners of one loaded model over KV pools of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.config import EngineConfig
from lockstep.core.errors import KernelError
from lockstep.core.probe import Probe
from lockstep.engine.loading import LoadedModel
from lockstep.executor.graphs import (
    DecodeGraphs,
    GraphMemory,
    Recipe,
    StepGraphs,
    why_no_choice,
    why_no_graphs,
    why_no_pieces,
)
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.inputs import LastTokens
from lockstep.executor.pieces import PiecedSteps, most_pieced_rows
from lockstep.executor.runner import ModelRunner
from lockstep.executor.transfers import Transfers
from lockstep.kv.pool.host_pool import HostPool
from lockstep.kv.pool.pool import KVPool
from lockstep.ops.selection import Binding
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform


class Runners:
    """Makes runners: one on trial, to see what a step takes, and the one that serves.

    `graph_use` says which steps are replayed as graphs. Raises KernelError for a kernel that no graph can hold under
    --strict-kernels.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        platform: Platform,
        mesh: Mesh,
        eos_token_ids: Sequence[int],
        probe: Probe | None,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._platform = platform
        self._rank = mesh.everyone.rank
        self._eos_token_ids = eos_token_ids
        self._probe = probe
        # Ranks sum over the same rows, padding included. Only the first may have a probe, which is shown all of them.
        has_probe = torch.tensor([probe is not None], dtype=torch.int32, device=loaded.build.device)
        self._is_watched = bool(mesh.everyone.all_gather(has_probe, 0).any())
        self.graph_use = decide_graphs(config, loaded.bindings, loaded.attention, is_watched=self._is_watched)

    def trial(self, num_pages: int) -> tuple[ModelRunner, KVPool]:
        """Without graphs and hooks, over so many pages. Computes all rows to the end, as any step may want."""
        pool = self._pool(num_pages)
        return self._runner(pool, (), None, wants_all=True), pool

    @torch.inference_mode()
    def record_largest(self, pool: KVPool) -> StepGraphs | None:
        """Recorded steps of which the largest are there, over a pool on trial; None where there are none."""
        graphs = self._graphs(pool)
        if graphs is not None:
            graphs.record_largest()
        return graphs

    @torch.inference_mode()
    def serving(self, num_pages: int, hooks: Sequence[SamplerHook]) -> tuple[ModelRunner, KVPool]:
        """With everything, over so many pages."""
        pool = self._pool(num_pages)
        graphs = self._graphs(pool)
        if graphs is not None:
            graphs.record_first()
        return self._runner(pool, hooks, graphs, wants_all=self._is_watched), pool

    def host_pool(self, pool: KVPool, num_pages: int) -> HostPool:
        """So many pages of host memory behind the pool. Raises OutOfMemory."""
        return HostPool(pool, num_pages=num_pages, new_stream=partial(self._platform.new_stream, self._rank))

    def _pool(self, num_pages: int) -> KVPool:
        return KVPool(
            tuple(self._loaded.build.kv_layers),
            num_pages=num_pages,
            page_size=self._config.cache.page_size,
            dtype=self._loaded.build.kv_dtype,
            allocate=lambda shape, dtype: self._platform.zeros(shape, dtype, self._rank),
        )

    def _graphs(self, pool: KVPool) -> StepGraphs | None:
        if not self.graph_use.any:
            return None
        device, most_requests = self._loaded.build.device, self._config.scheduler.max_running_requests
        last_tokens = LastTokens(most_requests, device)
        memory = GraphMemory(self._platform.new_graph)
        attention = self._loaded.attention
        whole = pieces = None
        if self.graph_use.decode == "full":
            assert isinstance(attention, PagedBackend), "no other has plans that can be filled again"
            recipe = Recipe(
                self._loaded.model,
                attention,
                pool,
                last_tokens,
                self._loaded.sampling,
                num_pages=-(-self._config.model.context_length // pool.page_size),
                device=device,
                new_graph=memory.new,
            )
            whole = DecodeGraphs(recipe, most_rows=most_requests)
        if "piecewise" in (self.graph_use.decode, self.graph_use.extend):
            pieces = PiecedSteps(
                self._loaded.model.forward,
                attention,
                pool,
                last_tokens,
                most_rows=self._most_pieced_rows(),
                most_sequences=most_requests,
                windows=self._loaded.build.windows,
                takes_single=self.graph_use.decode == "piecewise",
                takes_longer=self.graph_use.extend == "piecewise",
                device=device,
                new_graph=memory.new,
            )
        return StepGraphs(last_tokens, whole, pieces)

    def _most_pieced_rows(self) -> int:
        limits, weight_bytes = self._config.scheduler, self._loaded.build.weight_bytes
        largest = max(limits.max_running_requests, limits.chunked_prefill_size)
        return min(most_pieced_rows(weight_bytes), largest)

    def _runner(
        self,
        pool: KVPool,
        hooks: Sequence[SamplerHook],
        graphs: StepGraphs | None,
        *,
        wants_all: bool,
    ) -> ModelRunner:
        loaded = self._loaded
        return ModelRunner(
            loaded.model,
            pool,
            loaded.attention,
            max_sequences=self._config.scheduler.max_running_requests,
            windows=loaded.build.windows,
            eos_token_ids=self._eos_token_ids,
            transfers=Transfers(
                loaded.build.device,
                partial(self._platform.new_event, self._rank),
                loaded.copy_words.function,
            ),
            sampling=loaded.sampling,
            hooks=hooks,
            probe=self._probe,
            governor=loaded.governor,
            graphs=graphs,
            wants_all=wants_all,
        )


@dataclass(frozen=True, slots=True)
class GraphUse:
    """How steps of single tokens (`decode`: full, piecewise or off) and others (`extend`: piecewise or off) are
    submitted, and for each that is not as the configuration wants it, why."""

    decode: str
    extend: str
    why: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """True when some steps are replayed."""
        return (self.decode, self.extend) != ("off", "off")


def decide_graphs(
    config: EngineConfig, bindings: Sequence[Binding], attention: AttentionBackend, *, is_watched: bool
) -> GraphUse:
    """What becomes of --graphs and --extend-graphs with these kernels. `is_watched`: a probe is on some rank.

    Raises KernelError for a kernel that no graph can hold under --strict-kernels.
    """
    decode, extend = config.kernels.graphs, config.kernels.extend_graphs
    if (decode, extend) == ("off", "off"):
        return GraphUse("off", "off")
    if is_watched:
        return GraphUse("off", "off", ("a probe reads values while a step runs",))
    reason = why_no_pieces(bindings)
    if reason is not None:
        use = GraphUse("off", "off", (reason,))
    elif decode == "full" and (reason := why_no_graphs(bindings, attention)) is not None:
        use = GraphUse("piecewise", extend, (f"decoding in pieces: {reason}",))
    else:
        apart = why_no_choice(bindings) if decode == "full" else None
        use = GraphUse(decode, extend, () if apart is None else (f"greedy choices beside them: {apart}",))
    if reason is not None and config.kernels.strict_kernels:
        raise KernelError(f"--strict-kernels: --graphs {decode}, --extend-graphs {extend} cannot be: {reason}")
    return use
