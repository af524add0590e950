"""The part of a product of normalised rows that one program computes, and when single operators are better.

Each program normalises the rows anew, from the device's cache: that is a launch less, and more to read with each row.
A block multiplies rows that were normalised once, and only its gate is within: that too is a launch less, and with
many rows it is the outputs of the product that are neither written nor read.
Shapes of Qwen3's 0.6B, 8B and 30B-A3B were timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lockstep.ops.linear.tiles import Block, GatedBlock, Tile, default_tile

MOST_ROWS = 1
"""Beyond, single operators are quicker: 2 to 16 rows of every shape that was timed take 5 to 28 % less by them."""


class Problem(NamedTuple):
    """What decides a tile. `rows` is the most that share it; of a gated product `outputs` counts gate and up as two."""

    rows: int
    outputs: int
    inputs: int
    gated: bool


# One H100 80GB, bfloat16, weights from memory.
MEASURED: Mapping[Problem, Tile | Block | GatedBlock | None] = {
    Problem(1, 4096, 1024, False): Tile(1, 4, 512, 1, 2, 2),
    Problem(1, 5120, 2048, False): Tile(1, 4, 1024, 1, 4, 2),
    Problem(1, 6144, 1024, True): Tile(1, 4, 512, 1, 2, 2),
    Problem(64, 6144, 1024, True): None,
    Problem(128, 6144, 1024, True): Block(64, 64, 64, 1, 0, 4, 5),
    Problem(256, 6144, 1024, True): Block(128, 64, 64, 1, 0, 8, 5),
    Problem(512, 6144, 1024, True): None,
    Problem(2048, 6144, 1024, True): GatedBlock(128, 128, 64, 16, 1, 8, 3),
    Problem(8192, 6144, 1024, True): GatedBlock(128, 128, 64, 16, 1, 8, 4),
    Problem(1, 6144, 4096, False): Tile(1, 4, 1024, 1, 4, 2),
    Problem(1, 24576, 4096, True): Tile(1, 2, 2048, 1, 4, 2),
    Problem(256, 24576, 4096, True): None,
    Problem(512, 24576, 4096, True): GatedBlock(256, 64, 64, 8, 1, 8, 4),
    Problem(1024, 24576, 4096, True): None,
    Problem(2048, 24576, 4096, True): GatedBlock(128, 128, 64, 16, 1, 8, 3),
    Problem(8192, 24576, 4096, True): GatedBlock(256, 64, 64, 8, 1, 8, 4),
}
"""The best tile of each problem that was timed, fewest rows first; None where single operators are better."""


def tile_of(problem: Problem) -> Tile | Block | GatedBlock | None:
    """The tile for a product, never in parts, or None: single operators are to compute it."""
    for measured, tile in MEASURED.items():
        if 0 < problem.rows <= measured.rows and problem[1:] == measured[1:]:
            return tile
    if not 0 < problem.rows <= MOST_ROWS:
        return None
    width = problem.outputs // 2 if problem.gated else problem.outputs
    return default_tile(problem.rows, width, problem.inputs)._replace(splits=1)
