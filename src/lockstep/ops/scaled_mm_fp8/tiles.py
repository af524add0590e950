"""The part of the result that a program of the Triton kernel computes."""

from __future__ import annotations

from typing import NamedTuple

_PROGRAMS = 128
"""One for each processor of a large GPU."""


class Tile(NamedTuple):
    """`rows` x `outputs` of the result; `num_stages` blocks of the inputs are on their way at a time."""

    rows: int
    outputs: int
    num_warps: int
    num_stages: int


def tile_of(rows: int, outputs: int) -> Tile:
    """The tile for [rows, outputs].

    Few rows are bound by reading b: narrow tiles make enough programs to ask for all of it at once, many stages keep
    the requests coming. Many rows are bound by the products: wide tiles use each code that was read more often, where
    they are enough to occupy a large GPU. No tile spans two scales of b, 128 outputs apart.
    """
    if rows <= 16:
        return Tile(16, 32 if outputs <= 8192 else 64, num_warps=4, num_stages=5)
    if rows <= 64 or -(-rows // 128) * -(-outputs // 128) < _PROGRAMS:
        return Tile(64, 64, num_warps=4, num_stages=4)
    return Tile(128, 128, num_warps=8, num_stages=3)
