"""The part of a product that one program of the Triton kernels computes, and when another kernel is better.

A product of few rows is bound by reading the weight once. What counts is that every processor of the device has enough
of it on the way: enough programs, and enough in each. With more rows, both matrices are read from the device's cache
again and again, less often the larger the tiles are. The shapes of Qwen3's 0.6B, 8B and 30B-A3B were timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

_PROGRAMS = 256
"""About two for each processor of a large GPU."""

MOST_ROWS = 16
"""Beyond, what was not timed is left to the vendor's library."""


class Tile(NamedTuple):
    """`outputs` outputs of all rows, `inputs` at a time, in `splits` parts of all inputs, a power of two each.

    `rows` is how many the program is made for: 1 multiplies and adds; 16 and more are products of matrices, padded.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    num_warps: int
    num_stages: int


class Block(NamedTuple):
    """`outputs` outputs of `rows` rows, `inputs` at a time, in `splits` parts of all inputs, a power of two each.

    `ahead` inputs of each output are on their way to the device's cache before the rows are waited for. Tensor cores of
    Hopper take 64 outputs or more at once.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    ahead: int
    num_warps: int
    num_stages: int


class GatedBlock(NamedTuple):
    """`outputs` gates and as many ups of `rows` rows, `inputs` at a time, a power of two each: for many rows.

    `programs` for each processor of the device take blocks in turn; `group` blocks of rows share the weights at a time.
    """

    rows: int
    outputs: int
    inputs: int
    group: int
    programs: int
    num_warps: int
    num_stages: int


class Library(Enum):
    """The vendor's library, asked in another way than usual."""

    WITH_ZEROS = "with zeros for a bias"
    """torch then asks cuBLASLt, which for rows that are no multiple of 128 takes better kernels of long products."""


class Problem(NamedTuple):
    """What decides a tile. `rows` is the most that share it."""

    rows: int
    outputs: int
    inputs: int


# One H100 80GB, bfloat16, weights from memory; of 13 tiles for one row, 18 for up to 16 and 11 for more.
MEASURED: Mapping[Problem, Tile | Block | Library | None] = {
    Problem(1, 1024, 2048): Tile(1, 2, 2048, 1, 4, 2),
    Problem(16, 1024, 2048): Tile(16, 32, 128, 4, 4, 4),
    Problem(32, 1024, 2048): Block(16, 64, 128, 4, 1024, 4, 4),
    Problem(64, 1024, 2048): Block(32, 64, 128, 4, 1024, 4, 4),
    Problem(128, 1024, 2048): None,
    Problem(256, 1024, 2048): Block(64, 64, 128, 2, 1024, 4, 4),
    Problem(1, 1024, 3072): Tile(1, 4, 1024, 1, 4, 2),
    Problem(8, 1024, 3072): Tile(16, 64, 128, 4, 4, 4),
    Problem(16, 1024, 3072): Tile(16, 32, 128, 4, 4, 4),
    Problem(32, 1024, 3072): Tile(32, 64, 128, 4, 4, 4),
    Problem(64, 1024, 3072): Block(32, 64, 128, 4, 1024, 4, 4),
    Problem(1, 2048, 4096): Tile(1, 4, 1024, 1, 4, 2),
    Problem(16, 2048, 4096): Tile(16, 64, 128, 4, 4, 4),
    Problem(32, 2048, 4096): Tile(32, 64, 128, 2, 4, 4),
    Problem(1, 4096, 1024): Tile(1, 4, 512, 1, 2, 2),
    Problem(16, 4096, 1024): Block(16, 64, 128, 1, 0, 4, 4),
    Problem(32, 4096, 1024): Block(32, 64, 128, 1, 0, 4, 4),
    Problem(64, 4096, 1024): Block(32, 64, 128, 1, 1024, 4, 4),
    Problem(128, 4096, 1024): Block(64, 64, 128, 1, 1024, 4, 4),
    Problem(256, 4096, 1024): Block(64, 128, 128, 1, 512, 4, 4),
    Problem(1, 4096, 4096): Tile(1, 4, 1024, 1, 4, 2),
    Problem(8, 4096, 4096): Tile(16, 64, 128, 4, 4, 4),
    Problem(16, 4096, 4096): Tile(16, 64, 128, 2, 4, 4),
    Problem(32, 4096, 4096): Block(32, 64, 256, 1, 1024, 4, 4),
    Problem(1, 4096, 12288): Tile(1, 4, 1024, 1, 4, 2),
    Problem(16, 4096, 12288): Tile(16, 64, 128, 4, 4, 4),
    Problem(32, 4096, 12288): Block(32, 64, 256, 1, 1024, 4, 4),
    Problem(64, 4096, 12288): Block(64, 64, 256, 2, 1024, 4, 3),
    Problem(240, 4096, 12288): Library.WITH_ZEROS,
    Problem(1, 5120, 2048): Tile(1, 4, 512, 1, 2, 2),
    Problem(16, 5120, 2048): Tile(16, 64, 128, 1, 4, 4),
    Problem(32, 5120, 2048): Tile(32, 64, 128, 1, 4, 4),
    Problem(64, 5120, 2048): Block(64, 64, 128, 1, 0, 4, 4),
    Problem(1, 6144, 1024): Tile(1, 2, 1024, 1, 2, 2),
    Problem(16, 6144, 1024): Block(16, 64, 128, 1, 0, 4, 4),
    Problem(32, 6144, 1024): Tile(32, 64, 128, 1, 4, 4),
    Problem(64, 6144, 1024): Block(64, 64, 128, 1, 0, 4, 4),
    Problem(128, 6144, 1024): Block(64, 128, 64, 1, 0, 4, 5),
    Problem(1, 6144, 4096): Tile(1, 4, 1024, 1, 4, 2),
    Problem(16, 6144, 4096): Tile(16, 64, 128, 1, 4, 4),
    Problem(32, 6144, 4096): Tile(32, 64, 128, 1, 4, 4),
    Problem(64, 6144, 4096): Block(64, 64, 128, 1, 0, 4, 4),
    Problem(1, 24576, 4096): Tile(1, 4, 1024, 1, 4, 2),
    Problem(16, 24576, 4096): Tile(16, 64, 128, 1, 4, 4),
    Problem(32, 24576, 4096): Block(32, 128, 64, 1, 512, 4, 5),
}
"""The best tile of each problem that was timed, fewest rows first; None where the vendor's library is better, as it is
for more rows than are named."""


def tile_of(rows: int, outputs: int, inputs: int) -> Tile | Block | Library | None:
    """The tile for a product, or how the vendor's library is to compute it; None for as usual."""
    for problem, tile in MEASURED.items():
        if 0 < rows <= problem.rows and (outputs, inputs) == problem[1:]:
            return tile
    return default_tile(rows, outputs, inputs) if 0 < rows <= MOST_ROWS else None


def default_tile(rows: int, outputs: int, inputs: int) -> Tile:
    """A tile for what was not timed: lines of memory as long as they get, split where programs would be too few."""
    if rows == 1:
        return Tile(1, 4 if outputs <= 4 * 8 * _PROGRAMS else 8, 1024, 1, 4, 2)
    tile_outputs = 16 if outputs <= 32 * _PROGRAMS else 32 if outputs <= 64 * _PROGRAMS else 64
    splits = 1
    while splits < 8 and -(-outputs // tile_outputs) * splits < _PROGRAMS and inputs >= 512 * splits:
        splits *= 2
    return Tile(16, tile_outputs, 128, splits, 4, 4)
