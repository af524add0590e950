"""Kernels that follow page tables and read lengths on the device: nothing to plan but the tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.attention.backend import AttentionSpec, Span
from lockstep.attention.paged_backend import FixedTables, PageTables
from lockstep.attention.part import AttentionPart
from lockstep.attention.spans import Spans
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Kernel


class _TablePart(AttentionPart):
    """What both kinds of spans have in common."""

    def __init__(self, kernel: Kernel) -> None:
        self.provider = kernel.provider
        self._kernel = kernel

    @property
    def why_no_graphs(self) -> str | None:
        asks = self._kernel.asks_host
        return f"{self._kernel.op}.{self.provider} reads values on the host" if asks else None

    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> PageTables:
        return PageTables.of(Spans.of(spans, page_size), device)


class DecodeTables(_TablePart):
    """A kernel of attention_decode, over page tables."""

    def fixed_plan(self, num_keys_T: torch.Tensor, *, num_pages: int, page_size: int) -> FixedTables:
        return FixedTables(num_keys_T, num_pages, page_size)

    def refill(self, plan: FixedTables, spans: Sequence[Span]) -> None:
        plan.write(Spans.of(spans, plan.page_size))

    def run(
        self,
        plan: PageTables | FixedTables,
        q_TNH: torch.Tensor,
        kv: LayerKV,
        spec: AttentionSpec,
        out_TNH: torch.Tensor,
    ) -> None:
        where = (plan.page_table_BP, plan.num_keys_B)
        how = (spec.scale, spec.window, spec.soft_cap)
        self._kernel.function(q_TNH, kv.k_NPSH, kv.v_NPSH, *where, spec.sinks_N, out_TNH, *how)


class ExtendTables(_TablePart):
    """A kernel of attention_extend, over page tables."""

    def run(
        self, plan: PageTables, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        where = (plan.page_table_BP, plan.cu_rows_B1, plan.num_keys_B)
        how = (spec.scale, spec.window, spec.soft_cap)
        self._kernel.function(q_TNH, kv.k_NPSH, kv.v_NPSH, *where, spec.sinks_N, out_TNH, *how)
