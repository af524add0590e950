"""How many rows a program of the Triton kernels routes, and how many lanes share a row."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """`rows` tokens, each spread over `lanes` threads."""

    rows: int
    lanes: int
    num_warps: int


def tile_of(num_tokens: int) -> Tile:
    """The tile for so many tokens.

    Lists of different lanes are merged redundantly, so few lanes are cheapest: two, as soon as that keeps a large
    device's hundred thousand threads busy. Fewer tokens are spread further, which shortens the wait for each.
    """
    lanes = 2 if num_tokens >= 1 << 16 else 4 if num_tokens >= 1 << 14 else 8
    return tile_with(lanes, 4)


def tile_with(lanes: int, num_warps: int) -> Tile:
    """Rows for every thread of so many warps."""
    return Tile(num_warps * 32 // lanes, lanes, num_warps)
