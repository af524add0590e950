"""The Triton programs of argmax. Importing it imports Triton.

A candidate is one int64: its value's rank above, the complement of its place below. The largest candidate is then the
largest value, and of equal values the first; in whatever order tiles are compared, it is the same.
Shapes: R rows, V vocabulary, B tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.rows import power_of_two

WIDEST_TILE = 8192
NARROWEST_TILE = 512
"""A token for each thread, where warps have 64: a histogram must not meet what two threads hold."""
NUM_WARPS = 8

_PLACE_BITS = tl.constexpr(0x7FFFFFFF)
_NAN_RANK = tl.constexpr(0x7FFFFFFF)
NO_CANDIDATE = tl.constexpr(-0x8000000000000000)


@triton.jit
def _rank_of(values: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 values: both zeros are equal, NaN is above all."""
    bits = values.to(tl.int32, bitcast=True)
    rank = tl.where(values == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(values != values, _NAN_RANK, rank)


@triton.jit
def value_of(candidate: tl.tensor) -> tl.tensor:
    """The value of a candidate, float32."""
    rank = (candidate >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(candidate: tl.tensor) -> tl.tensor:
    """The place of a candidate in its row, int64."""
    return (candidate & _PLACE_BITS) ^ _PLACE_BITS


@triton.jit
def best_of_row(best_ptr: tl.tensor, row: tl.tensor, num_tiles: tl.tensor, TILES: tl.constexpr) -> tl.tensor:
    """The best candidate of all tiles of a row."""
    tile = tl.arange(0, TILES)
    found = tl.load(best_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=NO_CANDIDATE)
    return tl.max(found, 0)


@triton.jit
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger value, or NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _best_of_tile(
    logits_ptr: tl.tensor,
    best_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    first, at = tl.program_id(0) % num_tiles * BLOCK, tl.arange(0, BLOCK)
    # What lies beyond the row is never the first of equals: every tile begins inside.
    inside = first + at < vocab_size
    values = tl.load(logits_ptr + row * row_stride + first + at, mask=inside, other=-float("inf")).to(
        tl.float32
    )
    # Values before places: one comparison of a candidate for each value takes longer than reading it.
    best = tl.reduce(values, 0, _larger)
    if best == best:
        place = tl.min(tl.where(values < best, BLOCK, at), 0)
    else:
        place = tl.min(tl.where(values == values, BLOCK, at), 0)
    rank = _rank_of(best).to(tl.int64)
    tl.store(best_ptr + tl.program_id(0), (rank << 32) | ((first + place) ^ _PLACE_BITS).to(tl.int64))


@triton.jit
def _best_of_tiles(
    best_ptr: tl.tensor, values_ptr: tl.tensor, places_ptr: tl.tensor, num_tiles: tl.tensor, TILES: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    best = best_of_row(best_ptr, row, num_tiles, TILES)
    tl.store(values_ptr + row, value_of(best).to(values_ptr.dtype.element_ty))
    tl.store(places_ptr + row, place_of(best))


def tile_width(vocab_size: int) -> int:
    """Tokens of one tile."""
    return min(max(power_of_two(vocab_size), NARROWEST_TILE), WIDEST_TILE)


def best_of_tiles(logits_RV: torch.Tensor) -> torch.Tensor:
    """The best candidate of each tile, int64 [R, B]. Rows may lie apart, their values not."""
    num_rows, vocab_size = logits_RV.shape
    block = tile_width(vocab_size)
    num_tiles = triton.cdiv(vocab_size, block)
    best_RB = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=logits_RV.device)
    if num_rows:
        _best_of_tile[(num_rows * num_tiles,)](
            logits_RV,
            best_RB,
            logits_RV.stride(0),
            vocab_size,
            num_tiles,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return best_RB


def packed(logits_RV: torch.Tensor) -> torch.Tensor:
    """The same rows with their values side by side."""
    return logits_RV if logits_RV.stride(-1) == 1 else logits_RV.contiguous()


def search(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    logits_RV = packed(logits_RV)
    best_RB = best_of_tiles(logits_RV)
    num_rows, num_tiles = best_RB.shape
    values_R = torch.empty(num_rows, dtype=logits_RV.dtype, device=logits_RV.device)
    places_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    if num_rows:
        _best_of_tiles[(num_rows,)](
            best_RB, values_R, places_R, num_tiles, TILES=power_of_two(num_tiles), num_warps=1
        )
    return values_R, places_R
