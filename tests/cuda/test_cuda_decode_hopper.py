"""New tokens attended by the kernel in CUDA C++, on NVIDIA's Hopper: every way to share keys out, any length, early
launches."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from decode_chain import drawn

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "sm_90", "cuda_bindings"), seconds=60)

Pair = tuple[torch.Tensor, torch.Tensor]

HEAD_DIMS = (64, 128)
LONGEST = 5000


def blocks() -> list[Any]:
    """Those that are bound, and what else a kernel can be compiled for."""
    from lockstep.ops.norm_rope_attention_decode.hopper_blocks import DecodeBlock, block_of

    bound = {block_of(heads) for heads in (1, 16, 32, 64, 65)}
    return sorted(bound | {DecodeBlock(1, 4, 2), DecodeBlock(2, 1, 1)})


@dataclass
class Step:
    """New tokens of sequences with so many keys, in pools whose pages lie in any order."""

    lengths: list[int]
    heads: int
    kv_heads: int
    head_dim: int = 128
    page_size: int = 16
    norms: bool = True
    dtype: torch.dtype = torch.bfloat16
    eps: float = 1e-6
    new: torch.Tensor = field(init=False)
    weights: tuple[torch.Tensor | None, torch.Tensor | None] = field(init=False)
    cos_sin: Pair = field(init=False)
    pools: Pair = field(init=False)

    def draw(self, seed: int) -> None:
        rows, rng = len(self.lengths), random.Random(seed)
        counts = [-(-length // self.page_size) for length in self.lengths]
        pages = rng.sample(range(sum(counts) + 3), sum(counts))
        table = torch.full((rows, max([*counts, 1]) + 2), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.int32)
        self.table, self.num_keys = table.cuda(), torch.tensor(self.lengths, dtype=torch.int32).cuda()
        shape = (self.kv_heads, sum(counts) + 3, self.page_size, self.head_dim)
        self.pools = drawn(seed + 1, *shape, dtype=self.dtype), drawn(seed + 2, *shape, dtype=self.dtype)
        all_heads = self.heads + 2 * self.kv_heads
        self.new = drawn(seed + 3, rows, all_heads, self.head_dim, dtype=self.dtype)
        q_weight, k_weight = (drawn(seed + at, self.head_dim, scale=0.1, dtype=self.dtype) + 1 for at in (4, 5))
        self.weights = (q_weight, k_weight) if self.norms else (None, None)
        angles = torch.rand(rows, self.head_dim // 2, device="cuda") * 100
        self.cos_sin = (angles.cos(), angles.sin())
        self.scale = 1.3 * self.head_dim**-0.5
        torch.cuda.synchronize()

    def attend(self, block: Any, pools: Pair) -> torch.Tensor:
        from lockstep.ops.norm_rope_attention_decode.hopper import attend, can_be_attended

        out = torch.full((len(self.lengths), self.heads, self.head_dim), torch.nan, dtype=self.dtype).cuda()
        assert can_be_attended(self.new, self.cos_sin, pools, out)
        where = (self.table, self.num_keys, out)
        attend(self.new, self.weights, self.eps, self.cos_sin, pools, *where, self.scale, block, None)
        return out

    def exact(self, pools: Pair) -> torch.Tensor:
        """In float64; stores what is new in the pools, in their dtype."""
        out = torch.zeros(len(self.lengths), self.heads, self.head_dim, dtype=torch.float64, device="cuda")
        q, k, v = self.new.double().split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self._turned(q, self.weights[0]), self._turned(k, self.weights[1])
        for row, length in enumerate(self.lengths):
            if not length:
                continue
            page, slot = divmod(length - 1, self.page_size)
            pools[0][:, self.table[row, page], slot] = k[row].to(self.dtype)
            pools[1][:, self.table[row, page], slot] = v[row].to(self.dtype)
            pages = self.table[row, : page + 1].long()
            keys, values = (pool[:, pages].flatten(1, 2)[:, :length].double() for pool in pools)
            queries = q[row].to(self.dtype).double().unflatten(0, (self.kv_heads, -1))
            weights = torch.softmax(queries @ keys.transpose(1, 2) * self.scale, -1)
            out[row] = (weights @ values).flatten(0, 1)
        return out

    def _turned(self, heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight.double()
        first, second = heads.chunk(2, -1)
        cos, sin = (table.double()[:, None] for table in self.cos_sin)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def copied(pools: Pair) -> Pair:
    return pools[0].clone(), pools[1].clone()


def check(step: Step, block: Any, seed: int) -> None:
    step.draw(seed)
    expected_pools = copied(step.pools)
    expected = step.exact(expected_pools)
    pools = copied(step.pools)
    out = step.attend(block, pools)
    unit = torch.finfo(step.dtype).eps
    # Weights and results are rounded, and a rotated query and key once more where float64 rounds the other way.
    torch.testing.assert_close(out.double(), expected, rtol=4 * unit, atol=4 * unit)
    for found, wanted in zip(pools, expected_pools, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=unit, atol=unit / 8)
        assert (found != wanted).sum() <= 0.02 * wanted.numel()
    for _ in range(5):
        again = copied(step.pools)
        assert torch.equal(step.attend(block, again), out)
        assert all(map(torch.equal, again, pools))


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_any_length_group_and_page_and_the_same_bits_each_time(block: Any, seed: int) -> None:
    rng = random.Random(seed)
    edges = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 512, 1023]
    for group in range(1, 9):
        lengths = [*rng.sample(edges, 5), rng.randint(1, LONGEST)]
        kv_heads = rng.choice((1, 2, 8))
        head_dim, page_size = HEAD_DIMS[group % 2], rng.choice((16, 32, 48, 64))
        dtype = rng.choice((torch.bfloat16, torch.float16))
        print(f"seed {seed}: {group} x {kv_heads} of {head_dim}, pages of {page_size}, {dtype}, {lengths}")
        check(
            Step(lengths, group * kv_heads, kv_heads, head_dim, page_size, rng.random() < 0.7, dtype),
            block,
            seed + group,
        )


def test_many_sequences_of_any_length(seed: int) -> None:
    from lockstep.ops.norm_rope_attention_decode.hopper_blocks import block_of

    rng = random.Random(seed)
    for rows in (3, 7, 40, 200):
        step = Step([rng.randint(0, 900) for _ in range(rows)], 16, 8)
        check(step, block_of(rows * 8), seed + rows)


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_what_is_no_number_shows(block: Any, seed: int) -> None:
    """In a key or a value of any part, as it does in the reference: an engine looks for it in its scores."""
    for position in (5, 700, 1998):
        step = Step([2000, 30], 4, 2)
        step.draw(seed)
        page, slot = divmod(position, step.page_size)
        for pool in step.pools:
            pool[:, step.table[0, page], slot] = torch.nan
        out = step.attend(block, copied(step.pools))
        assert out[0].isnan().all() and out[1].isfinite().all(), position


def test_one_long_sequence_takes_more_turns_than_a_warp_has_lanes(seed: int) -> None:
    from lockstep.ops.norm_rope_attention_decode.hopper_blocks import DecodeBlock

    for block in (DecodeBlock(1, 2, 3), DecodeBlock(2, 4, 3)):
        check(Step([40 * 16 * 8 + 5, 33 * 16 * 8], 4, 2), block, seed)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 40, 128])
def test_a_chain_of_early_launches_waits_where_it_must(rows: int, seed: int) -> None:
    """Heads come from the kernel before, results go to the one after; keys of earlier tokens were there before."""
    from lockstep.ops.linear.kernels.cuda import linear
    from lockstep.ops.norm_rope_attention_decode.kernels.cuda import norm_rope_attention_decode

    width, rng = 1024, random.Random(seed)
    steps = [Step([rng.randint(1, 700) for _ in range(rows)], 16, 8) for _ in range(4)]
    for at, step in enumerate(steps):
        step.draw(seed + 10 * at)
    all_heads = 32 * 128
    weights = [
        (
            drawn(seed + at, all_heads, width, scale=width**-0.5),
            drawn(seed + at + 50, width, 16 * 128, scale=1 / 16),
        )
        for at in range(len(steps))
    ]
    x = drawn(seed, rows, width)

    def run(*, slowly: bool) -> list[torch.Tensor]:
        stream = x
        for step, (qkv, out_weight) in zip(steps, weights, strict=True):
            heads = linear(stream, qkv).view(rows, 32, 128)
            out = torch.empty(rows, 16, 128, dtype=torch.bfloat16, device="cuda")
            given = (heads, *step.weights, step.eps, *step.cos_sin, *step.pools, step.table, step.num_keys)
            norm_rope_attention_decode(*given, None, out, step.scale, 0, 0.0)
            stream = linear(out.flatten(1), out_weight)
            if slowly:
                torch.cuda.synchronize()
        return [stream, *(pool for step in steps for pool in step.pools)]

    expected = [value.clone() for value in run(slowly=True)]
    assert all(value.isfinite().all() for value in expected)
    for _ in range(20):
        assert all(map(torch.equal, run(slowly=False), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(slowly=False)
    for _ in range(20):
        recorded[0].zero_()
        graph.replay()
        assert all(map(torch.equal, recorded, expected))


def test_tensors_that_lie_otherwise_are_refused(seed: int) -> None:
    from lockstep.ops.norm_rope_attention_decode.hopper import can_be_attended

    step = Step([20, 30], 4, 2)
    step.draw(seed)
    out = torch.empty(2, 4, 128, dtype=torch.bfloat16, device="cuda")
    new, cos_sin, pools = step.new, step.cos_sin, step.pools
    assert can_be_attended(new, cos_sin, pools, out)
    apart = new.transpose(1, 2).contiguous().transpose(1, 2)
    assert not can_be_attended(apart, cos_sin, pools, out)
    odd = torch.empty(2, 8 * 128 + 1, dtype=torch.bfloat16, device="cuda")[:, 1:].unflatten(1, (8, 128))
    assert not can_be_attended(odd, cos_sin, pools, out)
    assert not can_be_attended(new, cos_sin, (pools[0], pools[1][:, ::2]), out)
    assert not can_be_attended(new, cos_sin, pools, torch.empty(4, 128, 2, device="cuda").transpose(1, 2))
