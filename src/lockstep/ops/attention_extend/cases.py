"""Generated calls of attention over pages, for attention_extend and attention_decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from lockstep.ops.cases import normal, strided
from lockstep.ops.contract import Signature

_Choice = TypeVar("_Choice")
_NUM_FREE_PAGES = 3
_NO_PAGE = -1
"""Fills a page table after a sequence's pages: it must not be followed."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes and options of a layer that attends."""

    heads: int
    kv_heads: int
    head_dim: int = 64
    page_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False

    @property
    def scale(self) -> float:
        """Not a power of two, so that rounding a scaled query shows; large enough that few keys dominate."""
        return 1.2 * self.head_dim**-0.5

    def signature(self, dtype: torch.dtype) -> Signature:
        sizes = {"head_dim": self.head_dim, "heads": self.heads, "kv_heads": self.kv_heads}
        flags = {"window": self.window, "soft_cap": self.soft_cap, "sinks": self.sinks}
        return {"dtype": dtype, "pool_dtype": dtype, "page_size": self.page_size, **sizes, **flags}

    def __str__(self) -> str:
        flags = (
            f"{f' window {self.window}' * bool(self.window)}{f' cap {self.soft_cap:g}' * bool(self.soft_cap)}"
        )
        return (
            f"{self.heads}/{self.kv_heads}x{self.head_dim} page {self.page_size}{flags}{' sinks' * self.sinks}"
        )


# Every number of query heads for a KV head that models have, every padded head size, each option on its own and with
# the others.
LAYERS = (
    Layer(1, 1, 64, 16),
    Layer(2, 1, 32, 1),
    Layer(9, 3, 64, 16, sinks=True),
    Layer(8, 2, 128, 64),
    Layer(10, 2, 80, 16, window=12),
    Layer(4, 4, 96, 1, soft_cap=5.0),
    Layer(12, 2, 64, 16, window=31, sinks=True),
    Layer(7, 1, 256, 16),
    Layer(16, 2, 64, 64, window=1),
    Layer(3, 3, 40, 4, window=20, soft_cap=3.0, sinks=True),
    Layer(6, 2, 192, 16, soft_cap=5.0, sinks=True),
    Layer(32, 2, 32, 16),
    Layer(128, 2, 32, 16, sinks=True),
    Layer(24, 2, 64, 16),
    Layer(9, 1, 64, 16),
    Layer(20, 2, 64, 16, sinks=True),
)


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """Queries, a pool with its pages in no order, and who owns which page."""

    q_TNH: torch.Tensor
    k_KPSH: torch.Tensor
    v_KPSH: torch.Tensor
    page_table_BP: torch.Tensor
    num_keys_B: torch.Tensor
    sinks_N: torch.Tensor | None
    out_TNH: torch.Tensor


def paged_inputs(
    generator: torch.Generator,
    layer: Layer,
    dtype: torch.dtype,
    num_rows: int,
    num_keys: Sequence[int],
    *,
    num_spare_pages: int = 0,
    slice_rows: bool = False,
    pages_first: bool = False,
    values: str = "",
    unseen: str = "",
) -> PagedInputs:
    """Random inputs for sequences of these lengths; `out` is NaN.

    `num_spare_pages` widens the page table. `slice_rows` leaves gaps between the heads of q, as products packed with
    keys do. `pages_first` gives a pool whose pages, not heads, are outermost in memory. `values` are those of queries
    and keys: "" for normal ones, "zero queries", "large queries" with keys as much smaller, or "spread scores". With
    `unseen` "NaN", so are the slots that hold no sequence's key: who had them before may have left anything there.
    """
    device = generator.device
    counts = [-(-length // layer.page_size) for length in num_keys]
    num_pages = sum(counts) + _NUM_FREE_PAGES
    free = torch.randperm(num_pages, generator=generator, dtype=torch.int32, device=device)
    width = max(counts, default=0) + num_spare_pages
    table = torch.full((len(counts), width), _NO_PAGE, dtype=torch.int32, device=device)
    for row, pages in zip(table, free.split([*counts, _NUM_FREE_PAGES]), strict=False):
        row[: len(pages)] = pages
    q = normal(generator, num_rows, layer.heads, layer.head_dim, dtype=dtype)
    shape = (layer.kv_heads, num_pages, layer.page_size, layer.head_dim)
    k, v = (normal(generator, *shape, dtype=dtype) for _ in range(2))
    if values == "spread scores":
        q, k = (
            _integers(generator, tensor, bound, step) for tensor, bound, step in ((q, 127, 0.25), (k, 4, 0.25))
        )
    elif values:
        q_scale, k_scale = {"zero queries": (0.0, 1.0), "large queries": (1024.0, 1 / 1024)}[values]
        q, k = q * q_scale, k * k_scale
    if unseen:
        slot_S = torch.arange(layer.page_size, device=device)
        is_seen_PS = torch.zeros(num_pages, layer.page_size, dtype=torch.bool, device=device)
        for row, length in zip(table.tolist(), num_keys, strict=True):
            for at, page in enumerate(row[: -(-length // layer.page_size)]):
                is_seen_PS[page] = slot_S < length - at * layer.page_size
        k, v = (pool.masked_fill(~is_seen_PS[None, :, :, None], torch.nan) for pool in (k, v))
    if pages_first:
        k, v = (pool.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for pool in (k, v))
    return PagedInputs(
        strided(q) if slice_rows else q,
        k,
        v,
        table,
        torch.tensor(num_keys, dtype=torch.int32, device=device),
        normal(generator, layer.heads, dtype=dtype) + 1 if layer.sinks else None,
        torch.full((num_rows, layer.heads, layer.head_dim), torch.nan, dtype=dtype, device=device),
    )


def _integers(generator: torch.Generator, like: torch.Tensor, bound: int, step: float) -> torch.Tensor:
    """Multiples of `step` up to `bound` of them: float32 holds sums of their products without an error.

    Scores of them reach 60, and the largest are close to each other in many rows: what rounds scores to 16 bits, or
    queries after their scale, moves weights by more than the rounding of a weight does.
    """
    drawn = torch.randint(-bound, bound + 1, like.shape, generator=generator, device=like.device)
    return (drawn * step).to(like.dtype)


def in_turn(first: int, choices: Sequence[_Choice]) -> Iterator[_Choice]:
    """The choices over and over, beginning with number `first`."""
    while True:
        yield choices[first % len(choices)]
        first += 1
