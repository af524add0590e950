"""Kernels of a decode step on an NVIDIA GPU beyond their contracts: every tile, rows alone, graphs, early launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_chain import Chain, assert_waits, bound, drawn

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=60)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding to bfloat16, and what cancels."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2**-7, atol=2**-8)


def tiles() -> list[Any]:
    from lockstep.ops.linear.tiles import Tile

    return [
        Tile(1, 4, 1024, 1, 4, 2),
        Tile(1, 2, 2048, 1, 4, 2),
        Tile(1, 8, 512, 4, 4, 2),
        Tile(16, 16, 128, 1, 4, 4),
        Tile(16, 16, 256, 8, 4, 3),
        Tile(16, 64, 128, 2, 4, 4),
        Tile(16, 128, 64, 4, 4, 4),
        Tile(32, 32, 128, 4, 4, 4),
    ]


@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_kind_of_tile_and_the_same_bits_each_time(tile: Any, seed: int) -> None:
    from lockstep.ops.linear.programs import product

    for outputs, inputs in ((1024, 3072), (1000, 4096), (4096, 1024)):
        x, weight = drawn(seed, tile.rows, inputs), drawn(seed + 1, outputs, inputs, scale=inputs**-0.5)
        bias = drawn(seed + 2, outputs)
        out = product(x, weight, bias, tile)
        assert_near(out, x.double() @ weight.double().T + bias.double())
        for _ in range(20):
            assert torch.equal(product(x, weight, bias, tile), out)


def blocks() -> list[Any]:
    from lockstep.ops.linear.tiles import Block

    return [
        Block(32, 64, 128, 1, 1024, 4, 4),
        Block(64, 64, 128, 4, 512, 4, 4),
        Block(64, 128, 64, 1, 0, 4, 4),
        Block(128, 64, 64, 8, 256, 4, 4),
        Block(128, 128, 64, 1, 512, 8, 4),
        Block(256, 64, 64, 2, 1024, 8, 4),
    ]


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_every_kind_of_block_and_the_same_bits_each_time(block: Any, seed: int) -> None:
    """Also rows, outputs and inputs that are no whole blocks: outputs of 16 bytes are what the engine can copy."""
    from lockstep.ops.linear.blocks import block_product

    for rows, outputs, inputs in ((256, 1024, 3072), (17, 1000, 4104), (200, 4096, 1024), (65, 152, 200)):
        x, weight = drawn(seed, rows, inputs), drawn(seed + 1, outputs, inputs, scale=inputs**-0.5)
        bias = drawn(seed + 2, outputs)
        out = block_product(x, weight, bias, block)
        expected = x.double() @ weight.double().T + bias.double()
        assert_near(out, expected)
        for _ in range(20):
            assert torch.equal(block_product(x, weight, bias, block), out)
        if block.splits == 1:
            gate, up = expected.chunk(2, -1)
            # Both factors are rounded once at the end alone.
            assert_near(block_product(x, weight, bias, block, gated=True), torch.nn.functional.silu(gate) * up)


def test_rows_that_lie_apart_or_start_anywhere(seed: int) -> None:
    """Slices of wider rows, as heads are, and memory that no engine copies from."""
    from lockstep.ops.linear.kernels.triton import linear

    wide, weight = drawn(seed, 64, 4096), drawn(seed + 1, 1024, 2048, scale=2048**-0.5)
    for first in (0, 1024, 3, 8):
        x = wide[:, first : first + 2048]
        assert_near(linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [2, 8, 16, 32, 64, 128])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows: int, seed: int) -> None:
    from lockstep.ops.linear.kernels.triton import linear

    x, weight = drawn(seed, rows, 2048), drawn(seed + 1, 1024, 2048, scale=2048**-0.5)
    others = x * 7
    others[rows // 2] = x[rows // 2]
    assert torch.equal(linear(x, weight)[rows // 2], linear(others, weight)[rows // 2])


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 50, 128, 256])
def test_a_chain_of_early_launches_waits_where_it_must(rows: int, seed: int) -> None:
    assert_waits(Chain(seed, rows), bound("triton"))
