"""Decoding in parts on an NVIDIA GPU: whoever comes last merges them, to the same bits each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=40)

LAYERS = (
    Layer(16, 8, 128, 16),
    Layer(32, 8, 128, 16, soft_cap=5.0),
    Layer(32, 4, 128, 1, sinks=True),
    Layer(9, 3, 80, 16, window=500, sinks=True),
    Layer(96, 1, 64, 16),
    Layer(4, 4, 256, 64),
)
LENGTHS = ((2100,), (5000, 0, 64, 1, 65, 700), tuple(range(0, 1200, 37)))


def in_float64(given: Any) -> Any:
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_order_of_arrival_gives_the_same_bits(layer: Layer, dtype: torch.dtype, seed: int) -> None:
    from lockstep.ops.arrivals import counters_of
    from lockstep.ops.attention_decode.programs import decode

    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-16
    for num_keys in LENGTHS:
        with torch.device("cuda"):
            generator = torch.Generator("cuda").manual_seed(seed)
            made = paged_inputs(generator, layer, dtype, len(num_keys), num_keys)
        pools, tables = (made.k_KPSH, made.v_KPSH), (made.page_table_BP, made.num_keys_B)
        given = (made.q_TNH, *pools, *tables, made.sinks_N)
        how = (layer.scale, layer.window, layer.soft_cap)
        decode(*given, made.out_TNH, *how)
        expected = torch.empty_like(made.out_TNH, dtype=torch.float64)
        attention_decode(*map(in_float64, (*given, expected, *how)))
        torch.testing.assert_close(made.out_TNH.double(), expected, rtol=2 * rounding, atol=2 * rounding)
        again = [torch.full_like(made.out_TNH, torch.nan) for _ in range(50)]
        for out in again:
            decode(*given, out, *how)
        assert all(torch.equal(out, made.out_TNH) for out in again)
        assert not counters_of(made.out_TNH.device).any()


class Chain:
    """Some layers' attention with the products around it: every kernel reads what the one before it wrote."""

    def __init__(self, seed: int, rows: int, num_layers: int) -> None:
        heads, kv_heads, head_dim, width, page_size = 16, 8, 128, 1024, 16
        torch.manual_seed(seed)
        self.shape = (rows, heads, head_dim)
        lengths = [1 + (97 * row + 800) % 1500 for row in range(rows)]
        num_pages = -(-max(lengths) // page_size)
        with torch.device("cuda"):
            self.stream = torch.randn(rows, width).bfloat16()
            self.weights = [
                (
                    (torch.randn((heads + 2 * kv_heads) * head_dim, width) * width**-0.5).bfloat16(),
                    (torch.randn(width, heads * head_dim) * 4 * (heads * head_dim) ** -0.5).bfloat16(),
                )
                for _ in range(num_layers)
            ]
            self.norm = (torch.randn(head_dim) * 0.1 + 1).bfloat16()
            angles = torch.rand(rows, head_dim // 2) * 100
            self.cos, self.sin = angles.cos(), angles.sin()
            shape = (kv_heads, rows * num_pages, page_size, head_dim)
            self.pools = [torch.randn(shape).bfloat16() for _ in range(2)]
            self.table = torch.randperm(rows * num_pages, dtype=torch.int32).view(rows, num_pages)
            self.num_keys = torch.tensor(lengths, dtype=torch.int32)
            last = self.num_keys.long() - 1
            page = self.table.long().gather(1, last[:, None] // page_size)[:, 0]
            self.slots = page * page_size + last % page_size

    def run(self, bound: dict[str, Callable[..., Any]]) -> torch.Tensor:
        x = self.stream
        for qkv, o in self.weights:
            heads = bound["linear"](x, qkv, None).view(self.shape[0], -1, self.shape[2])
            q = torch.empty(self.shape, dtype=torch.bfloat16, device="cuda")
            out = torch.empty_like(q)
            norms = (self.norm, self.norm, 1e-6, self.cos, self.sin)
            bound["norm_rope_store"](heads, *norms, *self.pools, self.slots, q)
            where = (*self.pools, self.table, self.num_keys)
            bound["attention_decode"](q, *where, None, out, self.shape[2] ** -0.5, 0, 0.0)
            x = bound["linear"](out.flatten(1), o, None)
        return x


def bound(provider: str) -> dict[str, Callable[..., Any]]:
    ops = ("linear", "norm_rope_store", "attention_decode")
    return {op: next(each.function for each in kernels(op) if each.provider == provider) for op in ops}


@pytest.mark.parametrize("rows", [1, 4, 16, 32, 60])
def test_a_chain_of_early_launches_waits_for_its_keys_and_parts(rows: int, seed: int) -> None:
    """Eager, again and again, and replayed: the same bits, and the reference's values."""
    chain, triton = Chain(seed, rows, num_layers=8), bound("triton")
    expected = chain.run(triton).clone()
    composed = chain.run(bound("reference"))
    assert (expected.double() - composed.double()).norm() / composed.double().norm() < 0.05
    assert all(torch.equal(chain.run(triton), expected) for _ in range(30))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain.run(triton)
    for _ in range(30):
        recorded.zero_()
        graph.replay()
        assert torch.equal(recorded, expected)
