"""Attention by a pair of kernels that follow page tables on the device.

Shapes: B sequences, P pages of the widest page table, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, Span
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.contract import Kernel

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
        num_pages = [-(-span.num_kv_tokens // self.page_size) for span in spans]
        width, most = self.page_table_BP.shape[1], max(num_pages, default=0)
        if most > width:
            raise KernelError(f"a sequence of {most} pages does not fit page tables of {width}")
        counts = np.zeros(self._counts.shape[0], dtype=np.int32)
        table_BP = np.zeros((len(spans), _aligned(most)), dtype=np.int32)
        row = 0
        for index, span in enumerate(spans):
            row += span.num_tokens
            counts[index] = span.num_kv_tokens
            counts[self._first_row + index + 1] = row
            table_BP[index, : num_pages[index]] = span.page_ids[: num_pages[index]]
        counts[self._first_row + len(spans) + 1 :] = row
        _copy(counts, self._counts)
        # A table for a whole context is far wider than most sequences need.
        _copy(table_BP, self.page_table_BP[: len(spans), : table_BP.shape[1]])


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """Rows of q up to `num_decode_rows` are single tokens; the rest belongs to `extend`, or is padding."""

    num_decode_rows: int
    decode: PageTables | None
    extend: PageTables | None


class PagedBackend(AttentionBackend):
    """A kernel of attention_decode for leading spans of one token, one of attention_extend for what follows.

    Graphs: `fixed_plan` gives a plan over fixed memory. What `run` submits over it may be captured, with kernels that
    read lengths on the device alone; each replay then computes what the last `refill` wrote.
    """

    def __init__(self, decode: Kernel, extend: Kernel) -> None:
        same = decode.provider == extend.provider
        self.name = decode.provider if same else f"{decode.provider} and {extend.provider}"
        self._decode = decode.function
        self._extend = extend.function

    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> PagedPlan:
        num_decode_rows = next((index for index, span in enumerate(spans) if span.num_tokens != 1), len(spans))
        single, longer = spans[:num_decode_rows], spans[num_decode_rows:]
        return PagedPlan(
            num_decode_rows,
            _tables_of(single, page_size, device) if single else None,
            _tables_of(longer, page_size, device) if longer else None,
        )

    def fixed_plan(self, *, num_rows: int, num_pages: int, page_size: int, device: torch.device) -> PagedPlan:
        """A plan for `num_rows` single tokens of sequences of up to `num_pages` pages; all padding at first."""
        return PagedPlan(num_rows, PageTables(num_rows, num_pages, page_size, device), None)

    def refill(self, plan: PagedPlan, spans: Sequence[Span]) -> None:
        """Writes other single tokens into a fixed plan, in stream order; rows after them become padding.

        Raises KernelError when they do not fit.
        """
        if plan.decode is None or any(span.num_tokens != 1 for span in spans):
            raise KernelError("only plans of single tokens can be refilled, with single tokens")
        plan.decode.write(spans)

    def run(self, plan: PagedPlan, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        out_TNH = torch.empty_like(q_TNH)
        pools = (kv.k_NPSH, kv.v_NPSH)
        how = (spec.scale, spec.window, spec.soft_cap)
        first = plan.num_decode_rows
        if plan.decode is not None:
            at = (plan.decode.page_table_BP, plan.decode.num_keys_B)
            self._decode(q_TNH[:first], *pools, *at, spec.sinks_N, out_TNH[:first], *how)
        if plan.extend is not None:
            tables = plan.extend
            where = (tables.page_table_BP, tables.cu_rows_B1, tables.num_keys_B)
            self._extend(q_TNH[first:], *pools, *where, spec.sinks_N, out_TNH[first:], *how)
        elif first < q_TNH.shape[0]:
            out_TNH[first:].zero_()
        return out_TNH


def _tables_of(spans: Sequence[Span], page_size: int, device: torch.device) -> PageTables:
    longest = max(span.num_kv_tokens for span in spans)
    tables = PageTables(len(spans), -(-longest // page_size), page_size, device)
    tables.write(spans)
    return tables


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _copy(source: np.ndarray, target: torch.Tensor) -> None:
    """Without waiting for the device, which may still be busy with what `target` held before."""
    packed = torch.from_numpy(source)
    target.copy_(packed if packed.device == target.device else packed.pin_memory(), non_blocking=True)
