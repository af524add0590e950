"""Attention over pages in two parts, and the page tables that kernels follow on the device.

Shapes: B sequences, P pages of the widest page table, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lockstep.attention.backend import AttentionBackend, AttentionSpec, FreshHeads, SingleTokens, Span
from lockstep.attention.part import AttentionPart
from lockstep.attention.sharing import Sharing, most_tiles
from lockstep.attention.spans import Spans, Stage, Stager
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_decode_shared.tiles import ROWS

_ALIGNED = 16
"""Tables and their rows begin at multiples of this many entries, so that one compiled kernel serves every step."""


class SharedTables:
    """Who shares which leading keys of up to so many single tokens, on the device: a Sharing in memory of its own.

    Without one nobody shares anything until it is written.
    """

    def __init__(
        self,
        num_sequences: int,
        num_tiles: int,
        device: torch.device,
        sharing: Sharing | None = None,
        stage: Stage = torch.from_numpy,
    ) -> None:
        self._first_tile = _aligned(num_sequences)
        self._written = self._host(sharing, num_tiles)
        self._memory = stage(self._written).to(device, non_blocking=True)
        self.shared_keys_B = self._memory[:num_sequences]
        self.tiles_TR = self._memory[self._first_tile :].view(num_tiles, ROWS)

    @classmethod
    def of(cls, sharing: Sharing, stage: Stage, device: torch.device) -> SharedTables:
        """The tables of one step."""
        return cls(len(sharing.shared_keys_B), len(sharing.tiles_TR), device, sharing, stage)

    def write(self, sharing: Sharing | None, stager: Stager) -> None:
        """Makes this what is shared, in stream order. What is there already is not written again."""
        memory = self._host(sharing, self.tiles_TR.shape[0])
        if not np.array_equal(memory, self._written):
            self._written = memory
            stager.fill(self._memory, memory)

    def _host(self, sharing: Sharing | None, num_tiles: int) -> np.ndarray:
        memory = np.zeros(self._first_tile + num_tiles * ROWS, dtype=np.int32)
        memory[self._first_tile :] = -1
        if sharing is not None:
            memory[: len(sharing.shared_keys_B)] = sharing.shared_keys_B
            memory[self._first_tile :][: sharing.tiles_TR.size] = sharing.tiles_TR.ravel()
        return memory


@dataclass(frozen=True, slots=True)
class PageTables:
    """Who owns which pages: the arguments of attention_extend, of which decoding takes the first two, and `shared`
    where some are read once for several sequences."""

    page_table_BP: torch.Tensor
    num_keys_B: torch.Tensor
    cu_rows_B1: torch.Tensor
    shared: SharedTables | None = None

    @classmethod
    def of(cls, spans: Spans, device: torch.device, sharing: Sharing | None = None) -> PageTables:
        """The tables of one step, in one copy to the device, and one more for what is shared."""
        count, width = len(spans), _aligned(max(1, spans.most_pages))
        first_row, first_page = _aligned(count), _aligned(count) + _aligned(count + 1)
        tables = np.zeros(first_page + count * width, dtype=np.int32)
        tables[:count] = spans.num_keys_B
        np.cumsum(spans.num_tokens_B, out=tables[first_row + 1 : first_row + count + 1])
        known_BP = spans.page_ids_BP[:, :width]
        tables[first_page:].reshape(count, width)[:, : known_BP.shape[1]] = known_BP
        there = spans.stage(tables).to(device, non_blocking=True)
        return cls(
            there[first_page:].view(count, width),
            there[:count],
            there[first_row : first_row + count + 1],
            None if sharing is None else SharedTables.of(sharing, spans.stage, device),
        )


class FixedTables:
    """The page tables of up to so many single tokens, of up to `num_pages` pages each, in fixed device memory.

    `num_keys_B` is another's to write. Until it says otherwise there are no keys: every row is padding. With `shares`
    there are tables of shared keys, too.
    """

    def __init__(
        self, num_keys_B: torch.Tensor, num_pages: int, page_size: int, *, shares: bool = False
    ) -> None:
        count, device = len(num_keys_B), num_keys_B.device
        self.num_keys_B = num_keys_B
        self.shared = SharedTables(count, most_tiles(count), device) if shares else None
        self.page_size = page_size
        shape = (count, _aligned(max(1, num_pages)))
        self.page_table_BP = torch.zeros(shape, dtype=torch.int32, device=device)
        self._written_BP = np.zeros(shape, dtype=np.int32)

    def write(self, spans: Spans) -> None:
        """Makes these the first sequences, in stream order. What is there already is not written again.

        Entries that nobody follows keep what they held. Raises KernelError when there are more sequences or pages
        than fit.
        """
        (num_rows, width), count, most = self._written_BP.shape, len(spans), spans.most_pages
        if count > num_rows:
            raise KernelError(f"{count} sequences do not fit page tables for {num_rows}")
        if most > width:
            raise KernelError(f"a sequence of {most} pages does not fit page tables of {width}")
        page_ids_BP, written_BP = spans.page_ids_BP[:, :most], self._written_BP[:count, :most]
        if np.array_equal(page_ids_BP, written_BP):
            return
        written_BP[:] = page_ids_BP
        spans.stager.fill(self.page_table_BP[:count, :most], page_ids_BP)


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

    def shares_keys(self, spans: Sequence[Span], page_size: int) -> bool:
        """True when these single tokens are better computed over a plan that `shares`."""
        return self._decode.shares_keys(Spans.of(spans, page_size))

    def fixed_plan(
        self, num_keys_T: torch.Tensor, *, num_pages: int, page_size: int, shares: bool = False
    ) -> PagedPlan:
        """A plan for as many single tokens, of sequences of up to `num_pages` pages; all padding at first.

        `num_keys_T` (int32, on the device) is part of it and others fill it, in stream order: the keys that each token
        of the step sees, 0 for padding. With `shares`, keys that several sequences have in common are read once.
        """
        fixed = self._decode.fixed_plan(num_keys_T, num_pages=num_pages, page_size=page_size, shares=shares)
        return PagedPlan(page_size, len(num_keys_T), fixed, None)

    def refill(self, plan: PagedPlan, spans: Sequence[Span]) -> None:
        """Writes the rest of a fixed plan for other single tokens, in stream order; rows after them become padding.

        Raises KernelError when they do not fit.
        """
        batch = Spans.of(spans, plan.page_size)
        if plan.decode is None or np.count_nonzero(batch.num_tokens_B != 1):
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

    @property
    def has_tables(self) -> bool:
        return self._decode.has_tables

    def single_tokens(self, plan: PagedPlan) -> SingleTokens | None:
        if plan.decode is None or plan.extend is not None:
            return None
        return self._decode.single_tokens(plan.decode)

    def takes_fresh(self, plan: PagedPlan) -> bool:
        return plan.decode is not None and plan.extend is None and self._decode.takes_fresh(plan.decode)

    def run_fresh(self, plan: PagedPlan, fresh: FreshHeads, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        num_rows, num_heads, head_dim = fresh.heads_TAH.shape
        size = (num_rows, num_heads - 2 * kv.k_NPSH.shape[0], head_dim)
        out_TNH = fresh.heads_TAH.new_empty(size, dtype=kv.k_NPSH.dtype)
        first = plan.num_decode_rows
        self._decode.run_fresh(plan.decode, fresh.leading(first), kv, spec, out_TNH[:first])
        if first < num_rows:
            out_TNH[first:].zero_()
        return out_TNH


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
