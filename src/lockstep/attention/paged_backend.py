"""Attention over pages in two parts, and the page tables that kernels follow on the device.

Shapes: B sequences, P pages of the widest page table, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.attention.part import AttentionPart
from lockstep.attention.spans import Spans
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV

_ALIGNED = 16
"""Tables and their rows begin at multiples of this many entries, so that one compiled kernel serves every step."""


class PageTables:
    """Who owns which pages, for up to `num_sequences` sequences of up to `num_pages` pages, in fixed device memory.

    page_table_BP, num_keys_B and cu_rows_B1 are the arguments of attention_extend; decoding takes the first two.
    Until `write` says otherwise there are no keys: every row is padding.
    """

    def __init__(self, num_sequences: int, num_pages: int, page_size: int, device: torch.device) -> None:
        self.num_sequences = num_sequences
        self.page_size = page_size
        self._first_row = _aligned(num_sequences)
        self._counts = torch.zeros(self._first_row + num_sequences + 1, dtype=torch.int32, device=device)
        self.num_keys_B = self._counts[:num_sequences]
        self.cu_rows_B1 = self._counts[self._first_row :]
        shape = (num_sequences, _aligned(max(1, num_pages)))
        self.page_table_BP = torch.zeros(shape, dtype=torch.int32, device=device)

    def write(self, spans: Sequence[Span]) -> None:
        """Makes these the first sequences and leaves the others without keys or rows, in stream order.

        Entries that nobody follows keep what they held. Raises KernelError when there are more sequences or pages
        than fit.
        """
        if len(spans) > self.num_sequences:
            raise KernelError(f"{len(spans)} sequences do not fit page tables for {self.num_sequences}")
        batch = Spans.of(spans, self.page_size)
        width, most = self.page_table_BP.shape[1], batch.most_pages
        if most > width:
            raise KernelError(f"a sequence of {most} pages does not fit page tables of {width}")
        counts = np.zeros(self._counts.shape[0], dtype=np.int32)
        counts[: len(batch)] = batch.num_keys_B
        cu_rows_B1 = counts[self._first_row :]
        np.cumsum(batch.num_tokens_B, out=cu_rows_B1[1 : len(batch) + 1])
        cu_rows_B1[len(batch) + 1 :] = cu_rows_B1[len(batch)]
        self._counts.copy_(batch.stage(counts), non_blocking=True)
        # A table for a whole context is far wider than most sequences need.
        table_BP = batch.page_table(_aligned(most))
        self.page_table_BP[: len(batch), : table_BP.shape[1]].copy_(batch.stage(table_BP), non_blocking=True)


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """Rows of q up to `num_decode_rows` are single tokens; the rest belongs to `extend`, or is padding.

    `decode` and `extend` are what the backend's parts planned, None where a part has nothing to do.
    """

    page_size: int
    num_decode_rows: int
    decode: Any
    extend: Any


class PagedBackend(AttentionBackend):
    """One part for leading spans of one token, another for what follows: the best of two providers, or one's.

    Graphs: where the first part has no reason against them, `fixed_plan` gives a plan over fixed memory. What `run`
    submits over it may be captured; each replay then computes what the last `refill` wrote.
    """

    def __init__(self, decode: AttentionPart, extend: AttentionPart) -> None:
        same = decode.provider == extend.provider
        self.name = decode.provider if same else f"{decode.provider} and {extend.provider}"
        self._decode = decode
        self._extend = extend

    @property
    def why_no_graphs(self) -> str | None:
        """Why no graph can hold a step of single tokens; None when one can."""
        return self._decode.why_no_graphs

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> PagedPlan:
        spans = Spans.of(spans, page_size)
        num_decode_rows = spans.num_leading_single
        single, longer = spans[:num_decode_rows], spans[num_decode_rows:]
        return PagedPlan(
            page_size,
            num_decode_rows,
            self._decode.plan(single, page_size=page_size, device=device) if single else None,
            self._extend.plan(longer, page_size=page_size, device=device) if longer else None,
        )

    def fixed_plan(self, *, num_rows: int, num_pages: int, page_size: int, device: torch.device) -> PagedPlan:
        """A plan for `num_rows` single tokens of sequences of up to `num_pages` pages; all padding at first."""
        fixed = self._decode.fixed_plan(
            num_rows=num_rows, num_pages=num_pages, page_size=page_size, device=device
        )
        return PagedPlan(page_size, num_rows, fixed, None)

    def refill(self, plan: PagedPlan, spans: Sequence[Span]) -> None:
        """Writes other single tokens into a fixed plan, in stream order; rows after them become padding.

        Raises KernelError when they do not fit.
        """
        batch = Spans.of(spans, plan.page_size)
        if plan.decode is None or batch.num_leading_single != len(batch):
            raise KernelError("only plans of single tokens can be refilled, with single tokens")
        self._decode.refill(plan.decode, batch)

    def run(self, plan: PagedPlan, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        out_TNH = torch.empty_like(q_TNH)
        self.run_into(plan, q_TNH, kv, spec, out_TNH)
        return out_TNH

    def run_into(
        self, plan: PagedPlan, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        first = plan.num_decode_rows
        if plan.decode is not None:
            self._decode.run(plan.decode, q_TNH[:first], kv, spec, out_TNH[:first])
        if plan.extend is not None:
            self._extend.run(plan.extend, q_TNH[first:], kv, spec, out_TNH[first:])
        elif first < q_TNH.shape[0]:
            out_TNH[first:].zero_()


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
