"""How many rows a program of the Triton kernels routes, and how many lanes share a row."""

from __future__ import annotations

from typing import NamedTuple

NUM_WARPS = 4


class Tile(NamedTuple):
    """`rows` tokens, each spread over `lanes` threads."""

    rows: int
    lanes: int


def tile_of(num_tokens: int) -> Tile:
    """The tile for so many tokens.

    Lists of different lanes are merged redundantly, so few lanes are cheapest: two, as soon as that keeps a large
    device's hundred thousand threads busy. Fewer tokens are spread further, which shortens the wait for each.
    """
    lanes = 2 if num_tokens >= 1 << 16 else 4 if num_tokens >= 1 << 14 else 8
    return Tile(NUM_WARPS * 32 // lanes, lanes)
