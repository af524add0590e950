"""The part of the second product that one thread block of the CUDA kernel computes, and when another kernel is better.

The product is bound by reading experts. One token or two give each multiprocessor one block with much on its way,
more give it several small ones. Measured on one NVIDIA H100 80GB with 8 of 128 experts of 768.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import NamedTuple

MOST_SHARED_BYTES = 220 * 1024
"""Of a thread block, beside the barriers and what is known of its choices."""

MOST_CHOICES = 32
"""Of a token: a warp knows one a lane."""

_MULTIPROCESSORS = 132
_COPY_BYTES = 4096
"""That a warp copies at a time at most, where that is more than one row."""

_MOST_WARPS = 8
_STAGES = 3
"""Of small blocks, and the fewest. Twice as many have one round of blocks; 4 and 8 were slower everywhere."""

_TOKENS_OF_ONE_ROUND = 2
"""With more, small blocks were better, of which several share a multiprocessor."""

FEW_TOKENS = _TOKENS_OF_ONE_ROUND + 1
"""More have the blocks of so many."""

_ALIGNED = 8
"""Numbers that are copied or multiplied together."""


class DownBlock(NamedTuple):
    """`rows` outputs of one token by `warps`, each with `stages` copies of `at_once` rows of an expert on their way."""

    rows: int
    warps: int
    at_once: int
    stages: int


class DownShape(NamedTuple):
    """What decides a block: experts of a token, outputs and inputs of each."""

    top_k: int
    width: int
    inner: int


@lru_cache(maxsize=4096)
def block_of(num_tokens: int, shape: DownShape) -> DownBlock | None:
    """The block for so many tokens; None for another kernel."""
    if shape.inner % _ALIGNED or not 0 < shape.top_k <= MOST_CHOICES or num_tokens == 0:
        return None
    for warps, at_once in _shares(shape.inner):
        rows, most_stages = warps * at_once, _STAGES
        if num_tokens <= _TOKENS_OF_ONE_ROUND:
            blocks_of_token = _MULTIPROCESSORS // num_tokens
            rows *= ceil(ceil(shape.width / blocks_of_token) / rows)
            most_stages *= 2
        for stages in (most_stages, _STAGES):
            block = DownBlock(rows, warps, at_once, stages)
            if shared_bytes(block, shape) <= MOST_SHARED_BYTES:
                return block
    return None


def shared_bytes(block: DownBlock, shape: DownShape) -> int:
    """Of one thread block: the inputs of its token, and weights on their way."""
    return 2 * shape.inner * (shape.top_k + block.warps * block.at_once * block.stages)


def _shares(inner: int) -> list[tuple[int, int]]:
    """Warps and rows that each copies at a time, best first."""
    at_once = next((rows for rows in (4, 2) if rows * 2 * inner <= _COPY_BYTES), 1)
    return [(_MOST_WARPS, at_once), (_MOST_WARPS // 2, 1)]
