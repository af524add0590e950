"""How many lanes of a warp share a row in the Triton kernels of routers, and what follows from it."""

from __future__ import annotations

_WARP = 32
_CHUNK = 128
"""Columns that are read at a time: 512 bytes of float32, one instruction of a warp for each row."""
_MOST_OF_LANE = 128
"""Logits that a lane keeps in registers while they arrive."""

LANES_FROM = ((1 << 16, 2), (1 << 14, 4), (0, 8))
"""From so many tokens on, so many lanes to a row.

Lists of different lanes are merged redundantly, so few lanes are cheapest, as soon as that keeps a large device busy: a
token of 128 float32 logits takes a warp 44, 54, 78 and 122 instructions with 1, 2, 4 and 8 lanes. One lane needs twice
the registers of two. Fewer tokens are spread further, which shortens the wait for each.
"""


def lanes_for(num_tokens: int, num_experts: int, lanes_from: tuple[tuple[int, int], ...] = LANES_FROM) -> int:
    """Lanes that share a row, of so many tokens and experts; eight at most."""
    wanted = next(lanes for first, lanes in lanes_from if num_tokens >= first)
    return min(max(wanted, power_of_two_from(num_experts) // _MOST_OF_LANE), 8)


def rows_of(lanes: int) -> int:
    """Rows of a warp. Programs are one warp, in which nothing waits for another one, unless said otherwise."""
    return _WARP // lanes


def num_warps_for(num_tokens: int, itemsize: int) -> int:
    """Warps of a program of softmax routing. Two keep more on its way from memory, where rows are long and many."""
    return 2 if num_tokens >= 1 << 16 and itemsize == 4 else 1


def power_of_two_from(least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (least - 1).bit_length()


def places_of(num_experts: int, lanes: int) -> int:
    """Columns that so many experts take: a power of two, and fours for every lane."""
    return max(power_of_two_from(num_experts), 4 * lanes)


def chunk_of(num_columns: int, lanes: int) -> int:
    """Columns that are read at a time, a power of two: no more than there are, rounded up."""
    return min(places_of(num_columns, lanes), _CHUNK)


def id_mask(num_ids: int) -> int:
    """A power of two less one that no id exceeds. Where ids fill fewer than eight fours, it is none of them."""
    return max(power_of_two_from(num_ids), 64) - 1
