"""Products of many rows that are gated where they are computed, on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=30)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def blocks() -> list[Any]:
    from lockstep.ops.linear.tiles import GatedBlock

    return [
        GatedBlock(128, 128, 64, 16, 1, 8, 4),
        GatedBlock(256, 64, 64, 8, 1, 8, 4),
        GatedBlock(128, 64, 64, 8, 2, 4, 3),
        GatedBlock(64, 64, 64, 3, 2, 4, 3),
    ]


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_any_size_and_the_same_bits_each_time(block: Any, seed: int) -> None:
    """Also rows, outputs and inputs that are no whole blocks, and fewer blocks than processors."""
    from lockstep.ops.linear.gated_blocks import can_be_gated, gated_product

    for rows, outputs, inputs in ((2500, 3072, 1024), (17, 1000, 4104), (700, 4096, 520), (257, 152, 200)):
        x = drawn(seed, rows, 2 * inputs)[:, inputs:]
        weight, bias = drawn(seed + 1, 2 * outputs, inputs, scale=inputs**-0.5), drawn(seed + 2, 2 * outputs)
        assert can_be_gated(x, weight)
        for given in (None, bias):
            out = gated_product(x, weight, given, block)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            gate, up = exact.chunk(2, -1)
            # Both factors are rounded once at the end alone.
            torch.testing.assert_close(out.double(), silu(gate) * up, rtol=2**-7, atol=2**-8)
            for _ in range(10):
                assert torch.equal(gated_product(x, weight, given, block), out)


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_waits_for_the_kernel_before_and_is_waited_for(block: Any, seed: int) -> None:
    """A chain of early launches, replayed: each reads what the one before it wrote."""
    from lockstep.ops.add_rms_norm.programs import add_and_normalise
    from lockstep.ops.linear.gated_blocks import gated_product

    stream, norm = drawn(seed, 1500, 1024), drawn(seed, 1024, scale=0.1) + 1
    weights = [drawn(seed + at, 2048, 1024, scale=1024**-0.5) for at in range(1, 9)]

    def chain() -> torch.Tensor:
        total, update = stream.clone(), stream
        for weight in weights:
            normed, total = add_and_normalise(update, total, norm, 1e-6)
            update = gated_product(normed, weight, None, block)
        return update

    def slowly() -> torch.Tensor:
        total, update = stream.clone(), stream
        for weight in weights:
            normed, total = add_and_normalise(update, total, norm, 1e-6)
            torch.cuda.synchronize()
            update = gated_product(normed, weight, None, block)
            torch.cuda.synchronize()
        return update

    expected = slowly()
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain()
    for _ in range(20):
        recorded.zero_()
        graph.replay()
        assert torch.equal(recorded, expected)
