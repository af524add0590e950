"""Runners of one loaded model over KV pools of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lockstep.attention.backend import AttentionBackend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.config import EngineConfig
from lockstep.core.errors import KernelError
from lockstep.core.probe import Probe
from lockstep.engine.loading import LoadedModel
from lockstep.executor.graphs import DecodeGraphs, why_no_graphs
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.inputs import LastTokens
from lockstep.executor.runner import ModelRunner
from lockstep.executor.transfers import Transfers
from lockstep.kv.pool.host_pool import HostPool
from lockstep.kv.pool.pool import KVPool
from lockstep.ops.selection import Binding
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.base import Platform


class Runners:
    """Makes runners: one on trial, to see what a step takes, and the one that serves.

    `no_graphs` says why every step is eager; None when steps of single tokens are replayed as graphs. Raises
    KernelError for a kernel that no graph can hold under --strict-kernels.
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
        self.no_graphs = _why_eager(config, loaded.bindings, loaded.attention, probe)

    def trial(self, num_pages: int) -> tuple[ModelRunner, KVPool]:
        """Without graphs and hooks, over so many pages."""
        pool = self._pool(num_pages)
        return self._runner(pool, (), None), pool

    @torch.inference_mode()
    def record_largest(self, pool: KVPool) -> DecodeGraphs | None:
        """Graphs of which the largest is recorded, over a pool on trial; None where there are none."""
        graphs = self._graphs(pool)
        if graphs is not None:
            graphs.step(self._config.scheduler.max_running_requests)
        return graphs

    @torch.inference_mode()
    def serving(self, num_pages: int, hooks: Sequence[SamplerHook]) -> tuple[ModelRunner, KVPool]:
        """With everything, over so many pages."""
        pool = self._pool(num_pages)
        graphs = self._graphs(pool)
        if graphs is not None:
            graphs.record_smallest()
        return self._runner(pool, hooks, graphs), pool

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

    def _graphs(self, pool: KVPool) -> DecodeGraphs | None:
        attention = self._loaded.attention
        if self.no_graphs is not None or not isinstance(attention, PagedBackend):
            return None
        return DecodeGraphs(
            self._loaded.model.forward,
            attention,
            pool,
            LastTokens(self._config.scheduler.max_running_requests, self._loaded.build.device),
            most_rows=self._config.scheduler.max_running_requests,
            num_pages=-(-self._config.model.context_length // pool.page_size),
            device=self._loaded.build.device,
            new_graph=self._platform.new_graph,
        )

    def _runner(self, pool: KVPool, hooks: Sequence[SamplerHook], graphs: DecodeGraphs | None) -> ModelRunner:
        loaded = self._loaded
        return ModelRunner(
            loaded.model,
            pool,
            loaded.attention,
            max_sequences=self._config.scheduler.max_running_requests,
            windows=loaded.build.windows,
            eos_token_ids=self._eos_token_ids,
            transfers=Transfers(loaded.build.device, partial(self._platform.new_event, self._rank)),
            sampling=loaded.sampling,
            hooks=hooks,
            probe=self._probe,
            governor=loaded.governor,
            graphs=graphs,
        )


def _why_eager(
    config: EngineConfig, bindings: Sequence[Binding], attention: AttentionBackend, probe: Probe | None
) -> str | None:
    """The reason why every step is eager; None when steps of single tokens are replayed as graphs.

    Raises KernelError for a kernel that no graph can hold under --strict-kernels.
    """
    if config.kernels.graphs == "off":
        return "--graphs off"
    if probe is not None:
        return "a probe reads values while a step runs"
    reason = why_no_graphs(bindings, attention)
    if reason is not None and config.kernels.strict_kernels:
        raise KernelError(f"--strict-kernels: --graphs {config.kernels.graphs} cannot be: {reason}")
    return reason
