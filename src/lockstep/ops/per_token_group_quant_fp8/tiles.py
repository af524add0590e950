"""How many groups a program of the Triton kernels takes."""

from __future__ import annotations

from typing import NamedTuple

WIDEST_GROUP = 32768
"""Elements of a group that a program can hold in registers: 1024 threads with 32 each."""

_ELEMENTS_PER_THREAD = 32  # 64 bytes of bfloat16 on their way for each thread hide the latency of memory
_MOST_ELEMENTS = 8192
_FEWEST_ELEMENTS = 1024
_PROGRAMS = 1024  # several for each processor of a large GPU


class Tile(NamedTuple):
    """The part of one program: `rows` x `groups` groups, each held in `block` elements, a power of two."""

    rows: int
    groups: int
    block: int
    num_warps: int


def tile_of(num_rows: int, num_groups: int, group: int) -> Tile:
    """The tile for [num_rows, num_groups * group]: large where memory is the limit, small where programs are few.

    Eight rows and eight groups at most, so that scales fill whole sectors of memory in either layout, unless there
    are too few groups in a row. A group wider than the tile is a tile of its own.
    """
    block = _power_of_two(group)
    share = num_rows * num_groups * block // _PROGRAMS
    elements = min(max(_power_of_two(share), _FEWEST_ELEMENTS), _MOST_ELEMENTS)
    room = max(elements // block, 1)
    groups = min(_power_of_two(num_groups), room, 8)
    rows = min(_power_of_two(num_rows), room // groups)
    threads = rows * groups * block // _ELEMENTS_PER_THREAD
    return Tile(rows, groups, block, min(max(threads // 32, 1), 32))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
