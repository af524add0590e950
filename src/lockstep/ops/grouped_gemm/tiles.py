"""The part of a grouped product that a program of the Triton kernel computes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

_LEAST_SHARED_BYTES = 48 * 1024
"""What every device offers."""


class Tile(NamedTuple):
    """`rows` x `outputs` of the result, `inputs` at a time, `num_stages` such steps on their way.

    A tile of one row may have 0 stages: then its steps are unrolled.
    """

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


class DeviceFacts(NamedTuple):
    """A device's name, and the memory that one program of it may share."""

    name: str
    shared_bytes: int


def rows_of(num_pairs: int, num_experts: int) -> int:
    """Rows of a block when the pairs are spread evenly: the power of two that holds an expert's share, 16 to 128."""
    share = -(-num_pairs // max(1, min(num_pairs, num_experts)))
    return min(128, max(16, 1 << (share - 1).bit_length()))


def default_tile(rows: int, itemsize: int, shared_bytes: int) -> Tile:
    """The tile for blocks of so many rows, where nothing was measured, on a device with so much memory on chip.

    Few rows are bound by reading weights: long inputs keep a line of memory together. Many rows are bound by the
    products: wide tiles use each value more often. The best of those that were timed on an H100, at 128 experts of
    768 x 2048 and 512, 8192 and 32768 pairs. float32 products run on no matrix unit, so their tiles are what registers
    hold.
    """
    if itemsize > 2:
        tile = Tile(rows, 32, 32, num_warps=4, num_stages=2)
    elif rows <= 32:
        tile = Tile(rows, 64, 128, num_warps=4, num_stages=3)
    elif rows <= 64:
        tile = Tile(rows, 256, 64, num_warps=8, num_stages=3)
    else:
        tile = Tile(rows, 128, 64, num_warps=8, num_stages=4)
    while step_bytes(tile, itemsize) > shared_bytes:
        tile = tile._replace(outputs=tile.outputs // 2)
    return tile._replace(num_stages=min(tile.num_stages, shared_bytes // step_bytes(tile, itemsize)))


def step_bytes(tile: Tile, itemsize: int) -> int:
    """What a program reads at one step; a gated product reads two weights."""
    return (tile.rows + 2 * tile.outputs) * tile.inputs * itemsize


@cache
def facts_of(device: torch.device) -> DeviceFacts:
    """What a tile depends on. A device that tells nothing, as a processor that interprets, has no name."""
    told = getattr(torch.get_device_module(device), "get_device_properties", None)
    facts = told(device) if told is not None else None
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    shared_bytes = max(getattr(facts, name, 0) for name in names)
    return DeviceFacts(getattr(facts, "name", ""), shared_bytes or _LEAST_SHARED_BYTES)
