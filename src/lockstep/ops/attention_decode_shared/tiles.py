"""Launch sizes of the Triton kernel of attention_decode_shared: small pure functions of the shapes."""

from __future__ import annotations

from lockstep.ops.attention_extend.tiles import Tile, decode_tile, power_of_two

ROWS = 32
"""Sequences of a tile: with four heads each, their queries fill matrix units while keys are read once."""

_HEADS = 4
_ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of a large device."""
_MOST_SPLITS = 16


def shared_tile(group: int, head_dim: int, itemsize: int) -> Tile:
    """A tile whose rows are pairs of one of ROWS sequences and a query head. Turns of its loop are attention_decode's.

    float32 and wide heads stay small enough for shared memory.
    """
    keys = decode_tile(group, head_dim, itemsize).keys
    wide = power_of_two(head_dim) > 128
    heads = 1 if itemsize > 2 else min(2 if wide else _HEADS, 1 << (group - 1).bit_length())
    return Tile(ROWS * heads, keys, 8 if heads == _HEADS or wide else 4, 2)


def shared_splits(num_sequences: int, num_head_programs: int, num_slots: int, keys: int) -> int:
    """Parts that shared keys are cut into, so that few tiles still fill the device.

    `num_slots` is the most keys that a sequence can have. It only drops parts that would be empty.
    """
    num_tiles = -(-num_sequences // ROWS)
    wanted = -(-_ENOUGH_PROGRAMS // (num_tiles * num_head_programs))
    return max(1, min(wanted, _MOST_SPLITS, -(-num_slots // keys)))
