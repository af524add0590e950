"""The part of a product that one thread block of the CUDA kernel computes, and when another kernel is better.

A product of some rows is bound by reading the weight once, from about 200 rows on by the tensor cores as well. So the
device's processors each get the same share of it, in one round, by large parts: parts read what they need of the rows
again, from the device's cache. The shapes of Qwen3's 0.6B, 8B and 30B-A3B were timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import ceil, lcm
from typing import NamedTuple

BLOCK_INPUTS = 64
"""Inputs that are copied at a time: a line of shared memory."""

MOST_SHARED_BYTES = 226 * 1024
"""Of a thread block, beside the barriers."""

MOST_ROWS = 256
"""More are bound by the device's power, and the vendor's library is as good."""

_FEW_ROWS = 64
_SHARED_BYTES_OF_FEW = 200_000
"""Blocks of few rows leave shared memory for the kernels before and after them."""

_MOST_ROWS_AT_ONCE = 256
"""That one instruction multiplies."""

_MOST_ROWS_OF_THREE = 216
"""That three warpgroups multiply with one instruction: beyond, registers do not suffice."""

_MOST_ROWS_OF_THREADS_ALIKE = 160
"""That three warpgroups multiply with the registers of threads that all have as many."""

COPY_REGISTERS = 32
"""Of a thread that copies, where those that multiply have its others."""

_MOST_STAGES = 24

_RESIDENT = {1: 132, 2: 132, 3: 117, 4: 120}
"""Thread blocks that run at a time on an H100, by how many a cluster has."""


class HopperBlock(NamedTuple):
    """64 * `warpgroups` outputs of `rows` rows, a multiple of 8 * `splits`, by one thread block, `stages` on their way.

    `splits` thread blocks, a cluster, have a part of all inputs each. Where that is one, `clusters` take blocks in
    turn; parts of sums are exchanged once, so that what is split comes in no turns.
    """

    rows: int
    warpgroups: int
    splits: int
    stages: int
    clusters: int = _RESIDENT[1]


class Way(NamedTuple):
    """How outputs and inputs are shared out; the block of `row_blocks` follows from the rows."""

    warpgroups: int
    splits: int
    row_blocks: int = 1


class Problem(NamedTuple):
    """What decides a block. `rows` is the most that share it; a gated product's `outputs` count gate and up as two."""

    rows: int
    outputs: int
    inputs: int
    gated: bool


# One H100 80GB, bfloat16, weights from memory, each behind a norm.
MEASURED: Mapping[Problem, Way | None] = {
    Problem(1, 1024, 2048, False): None,
    Problem(128, 1024, 2048, False): Way(1, 4),
    Problem(256, 1024, 2048, False): Way(1, 2, 2),
    Problem(1, 1024, 3072, False): None,
    Problem(256, 1024, 3072, False): Way(1, 4),
    Problem(1, 2048, 4096, False): None,
    Problem(16, 2048, 4096, False): Way(1, 3),
    Problem(256, 2048, 4096, False): None,
    Problem(1, 4096, 1024, False): None,
    Problem(16, 4096, 1024, False): Way(1, 2),
    Problem(256, 4096, 1024, False): None,
    Problem(256, 4096, 4096, False): Way(1, 2),
    Problem(256, 4096, 12288, False): Way(1, 2),
    Problem(256, 5120, 2048, False): None,
    Problem(1, 6144, 1024, True): None,
    Problem(128, 6144, 1024, True): Way(1, 1),
    Problem(256, 6144, 1024, True): Way(2, 1, 2),
    Problem(192, 6144, 4096, False): Way(1, 1),
    Problem(256, 6144, 4096, False): None,
    Problem(256, 24576, 4096, True): Way(3, 1),
    # For one row, too, where its best is found at once. Other ways were not timed.
    Problem(256, 151936, 1024, False): Way(3, 1),
}
"""The best way of each problem that was timed, fewest rows first; None where another kernel is better. One row is
the Triton program's where nothing was timed."""


_WAYS = tuple(Way(warpgroups, splits) for warpgroups in (1, 2, 3) for splits in (1, 2, 4))
"""That what was not timed may be computed in."""


@lru_cache(maxsize=8192)
def block_of(rows: int, outputs: int, inputs: int, *, gated: bool) -> HopperBlock | None:
    """The block for a product of a weight [outputs, inputs]; None for another kernel."""
    if not 0 < rows <= MOST_ROWS:
        return None
    for problem, way in MEASURED.items():
        if rows <= problem.rows and (outputs, inputs, gated) == problem[1:]:
            return None if way is None else block_in(rows, inputs, way)
    if rows == 1:
        return None
    ways = (way for way in _WAYS if block_in(rows, inputs, way) is not None)
    return block_in(rows, inputs, min(ways, key=lambda way: _microseconds(rows, outputs, inputs, way)))


def block_in(rows: int, inputs: int, way: Way) -> HopperBlock | None:
    """A way's block, of as many stages as there is use and room for; None for too many rows or too little room."""
    unit = 8 * way.splits if rows <= 32 else lcm(32, 8 * way.splits)
    of_rows = ceil(rows / (way.row_blocks * unit)) * unit
    if of_rows > _MOST_ROWS_AT_ONCE:
        return None
    room = _SHARED_BYTES_OF_FEW if rows <= _FEW_ROWS else MOST_SHARED_BYTES
    used = max(2, ceil(ceil(inputs / BLOCK_INPUTS) / way.splits))
    for stages in range(min(used, _MOST_STAGES), 1, -1):
        block = HopperBlock(of_rows, way.warpgroups, way.splits, stages)
        if shared_bytes(block) <= room:
            return block
    return None


def _microseconds(rows: int, outputs: int, inputs: int, way: Way) -> float:
    """About what it takes an H100: rounds of reading from memory, of moving into processors, of multiplying."""
    thread_blocks = ceil(outputs / (64 * way.warpgroups)) * way.splits
    of_weight = way.warpgroups * 64 * 2 * BLOCK_INPUTS
    moving = max(of_weight / 30e3, (of_weight + rows * 2 * BLOCK_INPUTS) / 90e3)
    multiplying = way.warpgroups * rows / 880
    rounds, rest = divmod(thread_blocks, _RESIDENT[way.splits])
    sizes = [_RESIDENT[way.splits]] * rounds + [rest] * (rest > 0)
    turn = sum(max(size * of_weight / 3.0e6, moving, multiplying) for size in sizes)
    exchanging = 3.0 if way.splits > 1 else 0.3
    return turn * ceil(ceil(inputs / BLOCK_INPUTS) / way.splits) + exchanging * len(sizes)


def rows_at_once(block: HopperBlock) -> int:
    """That one instruction multiplies."""
    halved = block.warpgroups == 3 and block.rows > _MOST_ROWS_OF_THREE
    return block.rows // 2 if halved else block.rows


def result_rows(block: HopperBlock) -> int:
    """That lie in shared memory at a time on their way out."""
    own = block.rows // block.splits
    return next(rows for rows in (32, 24, 16, 8) if own % rows == 0)


def shared_bytes(block: HopperBlock) -> int:
    """Of one thread block: what is on its way, or parts of sums; and results."""
    on_the_way = block.stages * (64 * block.warpgroups + block.rows) * 2 * BLOCK_INPUTS
    sums = 64 * block.warpgroups * block.rows * 4 if block.splits > 1 else 0
    return max(on_the_way, sums) + block.warpgroups * result_rows(block) * (2 * 64 + 16)


def registers(block: HopperBlock) -> int:
    """Of a thread that multiplies; 0 for what all threads have when the kernel starts, where that suffices."""
    if block.warpgroups == 3 and block.rows > _MOST_ROWS_OF_THREADS_ALIKE:
        return (65536 // 128 - COPY_REGISTERS) // block.warpgroups // 8 * 8
    return 0
