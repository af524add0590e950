"""Kernels that follow page tables and read lengths on the device: nothing to plan but the tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.attention.backend import AttentionSpec, FreshHeads, SingleTokens, Span
from lockstep.attention.paged_backend import FixedTables, PageTables
from lockstep.attention.part import AttentionPart
from lockstep.attention.sharing import Sharing, SharingFinder
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
        asking = (each for each in self._kernels() if each.asks_host)
        return next((f"{each.op}.{each.provider} reads values on the host" for each in asking), None)

    def _kernels(self) -> Sequence[Kernel]:
        return (self._kernel,)

    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> PageTables:
        return PageTables.of(Spans.of(spans, page_size), device)


class DecodeTables(_TablePart):
    """A kernel of attention_decode, over page tables. `shared`: one of attention_decode_shared, for steps whose
    sequences have many leading keys in common. `fresh`: one of norm_rope_attention_decode, for all other steps of
    nothing but single tokens."""

    def __init__(self, kernel: Kernel, shared: Kernel | None = None, fresh: Kernel | None = None) -> None:
        super().__init__(kernel)
        self._shared = shared
        self._fresh = fresh
        self._finder = SharingFinder()

    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> PageTables:
        batch = Spans.of(spans, page_size)
        return PageTables.of(batch, device, self._sharing(batch))

    def shares_keys(self, spans: Spans) -> bool:
        return self._sharing(spans) is not None

    def fixed_plan(
        self, num_keys_T: torch.Tensor, *, num_pages: int, page_size: int, shares: bool = False
    ) -> FixedTables:
        return FixedTables(num_keys_T, num_pages, page_size, shares=shares)

    def refill(self, plan: FixedTables, spans: Sequence[Span]) -> None:
        batch = Spans.of(spans, plan.page_size)
        plan.write(batch)
        if plan.shared is not None:
            plan.shared.write(self._sharing(batch), batch.stager)

    def run(
        self,
        plan: PageTables | FixedTables,
        q_TNH: torch.Tensor,
        kv: LayerKV,
        spec: AttentionSpec,
        out_TNH: torch.Tensor,
    ) -> None:
        given = (q_TNH, kv.k_NPSH, kv.v_NPSH, plan.page_table_BP, plan.num_keys_B)
        if self._shared is None or plan.shared is None:
            self._kernel.function(*given, spec.sinks_N, out_TNH, spec.scale, spec.window, spec.soft_cap)
        else:
            shared = (plan.shared.shared_keys_B, plan.shared.tiles_TR)
            self._shared.function(*given, *shared, spec.sinks_N, out_TNH, spec.scale, spec.soft_cap)

    @property
    def has_tables(self) -> bool:
        return True

    def single_tokens(self, plan: PageTables | FixedTables) -> SingleTokens | None:
        return None if plan.shared is not None else SingleTokens(plan.page_table_BP, plan.num_keys_B)

    def takes_fresh(self, plan: PageTables | FixedTables) -> bool:
        return self._fresh is not None and plan.shared is None

    def run_fresh(
        self,
        plan: PageTables | FixedTables,
        fresh: FreshHeads,
        kv: LayerKV,
        spec: AttentionSpec,
        out_TNH: torch.Tensor,
    ) -> None:
        if self._fresh is None:
            return super().run_fresh(plan, fresh, kv, spec, out_TNH)
        where = (kv.k_NPSH, kv.v_NPSH, plan.page_table_BP, plan.num_keys_B)
        how = (spec.scale, spec.window, spec.soft_cap)
        self._fresh.function(*fresh, *where, spec.sinks_N, out_TNH, *how)

    def _kernels(self) -> Sequence[Kernel]:
        return [kernel for kernel in (self._kernel, self._shared, self._fresh) if kernel is not None]

    def _sharing(self, spans: Spans) -> Sharing | None:
        return None if self._shared is None else self._finder.of(spans)


class ExtendTables(_TablePart):
    """A kernel of attention_extend, over page tables."""

    def run(
        self, plan: PageTables, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        where = (plan.page_table_BP, plan.cu_rows_B1, plan.num_keys_B)
        how = (spec.scale, spec.window, spec.soft_cap)
        self._kernel.function(q_TNH, kv.k_NPSH, kv.v_NPSH, *where, spec.sinks_N, out_TNH, *how)
