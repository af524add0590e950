"""How many heads a program of the Triton kernel rotates."""

from __future__ import annotations

from typing import NamedTuple

from lockstep.ops.rows import power_of_two

_MOST_ELEMENTS = 2048
_PROGRAMS = 1024  # several for each processor of a large GPU


class Tile(NamedTuple):
    """`heads` heads of one token, a power of two."""

    heads: int
    num_warps: int


def tile_of(num_tokens: int, num_heads: int, head_dim: int) -> Tile:
    """All heads of a token where tokens are plenty, within the registers; fewer where programs would be too few.

    A thread holds 16 elements, two reads of 16 bytes of a 16-bit dtype.
    """
    block = power_of_two(head_dim)
    share = power_of_two(num_tokens * num_heads // _PROGRAMS)
    heads = min(power_of_two(num_heads), max(_MOST_ELEMENTS // block, 1), max(share, 4))
    return Tile(heads, min(max(heads * block // (32 * 16), 1), 8))
