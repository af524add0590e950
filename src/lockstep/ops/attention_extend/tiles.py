"""Launch sizes of the Triton kernels of attention: small pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass

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


def extend_tile(group: int, head_dim: int, itemsize: int) -> Tile:
    """A tile for attention_extend; it holds at least one token with the `group` query heads of a KV head.

    128 rows reuse each key often enough to keep matrix units busy. Keys, values and queries in flight stay below
    160 KiB. float32 products have no matrix units that round right, so small tiles serve.
    """
    if itemsize > 2:
        return Tile(max(32, power_of_two(group)), 32, 4, 1)
    if power_of_two(head_dim) > 128:
        return Tile(max(64, power_of_two(group)), 32, 8, 2)
    return Tile(128, 64, 8, 3)


def decode_tile(group: int, head_dim: int, itemsize: int) -> Tile:
    """A tile for attention_decode: up to 64 query heads of a KV head, and enough keys in flight to hide memory."""
    rows = min(64, power_of_two(group))
    wide = power_of_two(head_dim) > 128
    if itemsize > 2:
        return Tile(rows, 16 if wide else 32, 4, 2)
    return Tile(rows, 32, 4, 2) if wide else Tile(rows, 64, 4, 3)


ENOUGH_PROGRAMS = 1024
MOST_SPLITS = 128


def num_splits(num_programs: int, num_slots: int, keys: int) -> int:
    """Parts that the keys of each sequence are cut into, so that few sequences still fill the device.

    `num_programs` run without splitting; about ENOUGH_PROGRAMS keep some hundred multiprocessors evenly busy.
    `num_slots` is the most keys that a sequence can have. It only drops parts that would be empty: what is computed
    depends on the number of sequences and their lengths, so a replayed graph with wider tables gives the same bits.
    """
    wanted = -(-ENOUGH_PROGRAMS // max(1, num_programs))
    return max(1, min(wanted, MOST_SPLITS, -(-num_slots // keys)))
