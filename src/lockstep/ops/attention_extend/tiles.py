"""Launch sizes of the Triton kernels of attention: small pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

WIDEST_HEAD = 256
WIDEST_GROUP = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows`: pairs of a new token and a query head; `keys`: keys of one turn of the loop."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and 16, the least that matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class TileTable:
    """Tiles of one program. `wide`: heads of more than 128 elements. `exact`: float32, whose products have no matrix
    units that round right. `few`: rows that would make fewer tiles of the usual size than there are multiprocessors.
    """

    usual: Tile
    wide: Tile
    exact: Tile
    few: Tile


# Measured on one H100 80GB: 8,192 tokens of 32 query and 8 KV heads of 128 in 1.54 ms (1.77 with 128 rows and three
# stages; 1.46 with 128 x 128 in eight warps, more shared memory than other devices have). Decoding 1 and 8 sequences of
# 1,024 keys with 16 and 8 heads takes 8.4 and 19 us. Wide heads and float32 stay small enough for shared memory.
EXTEND = TileTable(Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(64, 64, 4, 2))
DECODE = TileTable(Tile(64, 64, 2, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 2, 3))
ENOUGH_TILES = 132
"""One for each multiprocessor of a large device."""


def extend_tile(group: int, head_dim: int, itemsize: int, num_rows: int = 0, num_kv_heads: int = 1) -> Tile:
    """A tile for attention_extend; it holds at least one token with the `group` query heads of a KV head.

    `num_rows` tokens of `num_kv_heads` heads: 0 stands for many.
    """
    usual = EXTEND.usual
    if itemsize > 2:
        tile = EXTEND.exact
    elif power_of_two(head_dim) > 128:
        tile = EXTEND.wide
    elif 0 < num_rows * group * num_kv_heads <= ENOUGH_TILES * usual.rows:
        tile = EXTEND.few
    else:
        tile = usual
    return replace(tile, rows=max(tile.rows, power_of_two(group)))


def decode_tile(group: int, head_dim: int, itemsize: int) -> Tile:
    """A tile for attention_decode."""
    wide = power_of_two(head_dim) > 128
    tile = DECODE.exact if itemsize > 2 else DECODE.wide if wide else DECODE.usual
    keys = 16 if wide and itemsize > 2 else tile.keys
    return replace(tile, rows=min(tile.rows, power_of_two(group)), keys=keys)


WHOLE_WARPS = 4
"""Warps of a decoding program that sees all keys of its sequence: 1 to 2 % faster than two on 250 long ones."""

ENOUGH_PROGRAMS = 512
"""Keys are split where there are fewer programs than this: no more of them ever count arrivals."""
MOST_SPLITS = 128
MERGED_HEADS, MERGED_PARTS = 4, 16
"""Heads, and parts of each, that are merged at a time: with 128 elements a head, 128 registers of each thread of two
warps. The number of parts in a turn decides about the order of additions, and so about bits."""


def num_splits(num_programs: int, num_slots: int, keys: int) -> int:
    """Parts that the keys of each sequence are cut into, so that few sequences still fill the device.

    `num_programs` run without splitting; about ENOUGH_PROGRAMS keep some hundred multiprocessors evenly busy.
    `num_slots` is the most keys that a sequence can have. It only drops parts that would be empty: what is computed
    depends on the number of sequences and their lengths, so a replayed graph with wider tables gives the same bits.
    """
    wanted = -(-ENOUGH_PROGRAMS // max(1, num_programs))
    return max(1, min(wanted, MOST_SPLITS, -(-num_slots // keys)))


def least_turns(num_programs: int) -> int:
    """Turns of the loop that a part has at least: where programs are many already, a few hundred keys stay whole.

    Measured on one H100 80GB: 32 sequences of 320 keys, 5 % of a whole step of Qwen3-0.6B; with fewer it costs as much.
    """
    return 4 if num_programs >= ENOUGH_PROGRAMS // 4 else 1
