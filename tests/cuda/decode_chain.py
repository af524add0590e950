"""Blocks of a decoder whose kernels are launched early: each reads what the one before it wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernels = dict[str, Callable[..., Any]]


def drawn(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(seed)
    values = (torch.randn(*shape, device="cuda") * scale).to(dtype)
    torch.cuda.synchronize()  # weights are there before a kernel that reads them is launched
    return values


class Chain:
    """Some blocks of a decoder without attention: every kernel reads what the one before it wrote."""

    def __init__(self, seed: int, rows: int) -> None:
        width, inner, num_blocks = 1024, 3072, 6
        heads, kv_heads, head_dim = 16, 8, 128
        self.stream = drawn(seed, rows, width)
        self.blocks = [
            (
                drawn(seed + at, (heads + 2 * kv_heads) * head_dim, width, scale=width**-0.5),
                drawn(seed + at + 1, width, heads * head_dim, scale=(heads * head_dim) ** -0.5),
                drawn(seed + at + 2, 2 * inner, width, scale=width**-0.5),
                drawn(seed + at + 3, width, inner, scale=inner**-0.5),
            )
            for at in range(0, 4 * num_blocks, 4)
        ]
        self.norm = drawn(seed, width, scale=0.1) + 1
        self.head_norm = drawn(seed, head_dim, scale=0.1) + 1
        angles = torch.rand(rows, head_dim // 2, device="cuda") * 100
        self.cos, self.sin = angles.cos(), angles.sin()
        self.pools = [torch.zeros(kv_heads, 16, 16, head_dim, device="cuda").bfloat16() for _ in range(2)]
        self.slots = torch.randperm(256, device="cuda")[:rows]
        self.shape = (rows, heads, head_dim)

    def run(self, kernels: Kernels) -> tuple[torch.Tensor, ...]:
        total, update = self.stream.clone(), None
        for qkv, out, gate_up, down in self.blocks:
            packed, total = kernels["add_norm_linear"](update, total, self.norm, 1e-6, qkv, None, False)
            heads = packed.view(self.shape[0], -1, self.shape[2])
            q = torch.empty(self.shape, dtype=torch.bfloat16, device="cuda")
            weights = (self.head_norm, self.head_norm, 1e-6, self.cos, self.sin)
            kernels["norm_rope_store"](heads, *weights, *self.pools, self.slots, q)
            update = kernels["linear"](q.flatten(1), out, None)
            inner, total = kernels["add_norm_linear"](update, total, self.norm, 1e-6, gate_up, None, True)
            update = kernels["linear"](inner, down, None)
        assert update is not None
        return update, total, *self.pools


def bound(*providers: str) -> Kernels:
    """Each operator's kernel of the first provider that has one."""
    from lockstep.ops.registry import kernels

    def of(op: str) -> Callable[..., Any]:
        by_provider = {each.provider: each.function for each in kernels(op)}
        return next(by_provider[provider] for provider in providers if provider in by_provider)

    return {op: of(op) for op in ("add_norm_linear", "norm_rope_store", "linear")}


def assert_waits(chain: Chain, kernels: Kernels) -> None:
    """Eager, again and again, and replayed: the same bits; and the composition's values."""
    expected = [value.clone() for value in chain.run(kernels)]
    composed = [value.clone() for value in chain.run(bound("reference"))]
    for found, wanted in zip(expected, composed, strict=True):
        off = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert off < 0.03, off
    for _ in range(30):
        assert all(map(torch.equal, chain.run(kernels), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain.run(kernels)
    for _ in range(30):
        for value in (*recorded[:2], *chain.pools):
            value.zero_()
        graph.replay()
        assert all(map(torch.equal, recorded, expected))
    chain.stream.mul_(2)
    graph.replay()
    assert all(map(torch.equal, recorded, [value.clone() for value in chain.run(kernels)]))
