"""The part of the way into a mixture that one program computes, and when single operators are better.

Every program reads all rows, from the device's cache, for the scale of their norm. So there are few rows, and only as
many programs as bring the router's weight in time.
"""

from __future__ import annotations

from typing import NamedTuple

from lockstep.ops.rows import power_of_two

MOST_ROWS = 16
MOST_EXPERTS = 256
"""Logits of so many rows and experts are in the registers of the one program that chooses."""

_MOST_INPUTS = 512
"""Of a part: weights and rows of it lie in memory that every device has."""
_PARTS = 8


class Tile(NamedTuple):
    """`experts` logits of all rows, from a part of the inputs that is `inputs` wide, a power of two each.

    `rows` is how many the program is made for, 8 at least: a product of matrices, padded.
    """

    rows: int
    experts: int
    inputs: int
    num_warps: int


def tile_of(rows: int, inputs: int) -> Tile | None:
    """The tile for so many rows, or None: single operators are to compute it."""
    if not 0 < rows <= MOST_ROWS:
        return None
    padded = next(size for size in (8, 16) if rows <= size)
    part = min(max(power_of_two(-(-inputs // _PARTS)), 64), _MOST_INPUTS)
    return Tile(padded, 16, part, 8)
