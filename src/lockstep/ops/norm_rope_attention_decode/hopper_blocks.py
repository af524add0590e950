"""How the keys of a step are shared out on a Hopper."""

from __future__ import annotations

from typing import NamedTuple

TILE = 16
"""Keys that a warp multiplies at once."""


class DecodeBlock(NamedTuple):
    """How many thread blocks share a KV head of a sequence, the warps of each, and the tiles of a warp on their way."""

    cluster: int
    warps: int
    stages: int


_MEASURED = (
    (8, DecodeBlock(8, 8, 2)),
    (16, DecodeBlock(8, 8, 1)),
    (32, DecodeBlock(4, 8, 1)),
    (64, DecodeBlock(4, 4, 2)),
)
"""The most KV heads of all sequences that a block was the best for, on one NVIDIA H100 80GB."""

_FOR_MORE = DecodeBlock(2, 4, 2)


BLOCKS = (*(block for _, block in _MEASURED), _FOR_MORE)


def block_of(num_kv_heads: int) -> DecodeBlock:
    """For so many KV heads, those of all sequences together: few are shared by more thread blocks."""
    return next((block for most, block in _MEASURED if num_kv_heads <= most), _FOR_MORE)


def shared_bytes(block: DecodeBlock, head_dim: int) -> int:
    """Of a thread block: the keys and values that its warps have in flight, of 16 bits each."""
    return block.warps * block.stages * 2 * TILE * head_dim * 2
