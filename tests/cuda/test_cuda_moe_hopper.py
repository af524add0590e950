"""The second product of a mixture by the kernel in CUDA C++, on NVIDIA's Hopper: any size and block, early launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from decode_chain import drawn

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "sm_90", "cuda_bindings"), seconds=30)

ELSEWHERE = -1


class Routed(NamedTuple):
    """What the second product reads, in the order in which it is given."""

    inner: torch.Tensor
    down: torch.Tensor
    shares: torch.Tensor
    ids: torch.Tensor


def routed(
    seed: int,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    elsewhere: float = 0.1,
) -> Routed:
    """Tokens, experts, choices, width and inner size; a part of the choices, and all of the last token, elsewhere."""
    tokens, experts, top_k, width, inner = sizes
    rows = drawn(seed, tokens * top_k, inner, dtype=dtype)
    down = drawn(seed + 1, experts, width, inner, scale=inner**-0.5, dtype=dtype)
    shares = torch.rand(tokens, top_k, device="cuda")
    # Ids lie beside other numbers, as slices do.
    ids = torch.rand(tokens, experts, device="cuda").argsort(-1).to(torch.int32)[:, :top_k]
    if elsewhere:
        ids[torch.rand(ids.shape, device="cuda") < elsewhere] = ELSEWHERE
        if tokens > 1:
            ids[-1] = ELSEWHERE
        # Nobody wrote what belongs to them.
        rows[ids.flatten() == ELSEWHERE] = torch.nan
    torch.cuda.synchronize()
    return Routed(rows, down, shares, ids)


def exact(given: Routed) -> torch.Tensor:
    """In float64, one token after the other."""
    inner, down, shares, ids = given
    tokens, top_k = ids.shape
    out = torch.zeros(tokens, down.shape[1], dtype=torch.float64, device="cuda")
    for token in range(tokens):
        for choice, expert in enumerate(ids[token].tolist()):
            if expert != ELSEWHERE:
                row = inner[token * top_k + choice].double()
                out[token] += shares[token, choice].double() * (down[expert].double() @ row)
    return out


def computed(given: Routed, block: Any = None) -> torch.Tensor:
    """Without a block by the rule's."""
    from lockstep.ops.fused_moe.hopper_down import weighted_down
    from lockstep.ops.fused_moe.hopper_down_blocks import DownShape, block_of

    tokens, top_k = given.ids.shape
    block = block or block_of(tokens, DownShape(top_k, *given.down.shape[1:]))
    assert block is not None
    return weighted_down(*given, block, None)


SIZES = [
    *((1, 128, 8, 2048, 768), (8, 128, 8, 2048, 768), (16, 64, 8, 2048, 768)),
    *((3, 6, 1, 96, 64), (5, 4, 2, 96, 64), (2, 16, 6, 2048, 1408), (3, 8, 4, 2880, 2880), (2, 4, 3, 577, 8)),
    *(
        (4, 8, 2, 130, 512),
        (1, 40, 32, 200, 384),
        (2, 3, 1, 64, 8192),
        (40, 16, 4, 1024, 256),
        (140, 8, 2, 512, 64),
    ),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_and_the_same_bits_each_time(sizes: tuple[int, int, int, int, int], seed: int) -> None:
    for elsewhere in (0.0, 0.2):
        given = routed(seed, sizes, elsewhere=elsewhere)
        out = computed(given)
        # One rounding, and float32 sums.
        torch.testing.assert_close(out.double(), exact(given), rtol=2**-8, atol=2**-14)
        for _ in range(5):
            assert torch.equal(computed(given), out)


def test_float16(seed: int) -> None:
    given = routed(seed, (6, 16, 4, 640, 768), dtype=torch.float16)
    torch.testing.assert_close(computed(given).double(), exact(given), rtol=2**-11, atol=2**-14)


def test_tokens_that_all_have_the_same_experts(seed: int) -> None:
    given = routed(seed, (8, 16, 4, 1024, 768), elsewhere=0.0)
    given.ids.copy_(given.ids[:1].expand(8, -1).clone())
    torch.testing.assert_close(computed(given).double(), exact(given), rtol=2**-8, atol=2**-14)


@pytest.mark.parametrize("tokens", [1, 8])
def test_every_block_gives_the_same_bits(tokens: int, seed: int) -> None:
    """So that a token's do not depend on how many are beside it."""
    from lockstep.ops.fused_moe.hopper_down_blocks import DownBlock

    given = routed(seed, (tokens, 32, 8, 1000, 768))
    out = computed(given)
    ways = (
        *((16, 8, 2, 8), (16, 8, 1, 3), (16, 16, 1, 4), (8, 4, 2, 3), (64, 4, 4, 4), (128, 8, 2, 5)),
        *((96, 8, 1, 4), (256, 4, 2, 8), (1024, 2, 8, 3), (512, 1, 16, 2)),
    )
    for way in ways:
        block = DownBlock(*way)
        assert torch.equal(computed(given, block), out), block


class Mixtures:
    """Layers that are nothing but routers and mixtures: every kernel reads what the one before it wrote."""

    EXPERTS, TOP_K, WIDTH, INNER = 128, 8, 2048, 768

    def __init__(self, seed: int, rows: int, num_layers: int) -> None:
        self.norm = drawn(seed, self.WIDTH, scale=0.1) + 1
        self.routers = [
            drawn(seed + at, self.EXPERTS, self.WIDTH, scale=self.WIDTH**-0.5) for at in range(num_layers)
        ]
        self.experts = [
            (
                drawn(seed + at, self.EXPERTS, 2 * self.INNER, self.WIDTH, scale=self.WIDTH**-0.5),
                drawn(seed - at, self.EXPERTS, self.WIDTH, self.INNER, scale=self.INNER**-0.5),
            )
            for at in range(2)
        ]
        self.stream, self.update = drawn(seed + 1, rows, self.WIDTH), drawn(seed + 2, rows, self.WIDTH)

    def run(self, between: Callable[[], object] = lambda: None) -> tuple[torch.Tensor, ...]:
        from lockstep.ops.add_norm_route.kernels.triton import add_norm_route
        from lockstep.ops.fused_moe.kernels.cuda import fused_moe

        update, total = self.update, self.stream
        for at, router in enumerate(self.routers):
            normed, total, shares, ids = add_norm_route(
                update, total, self.norm, 1e-6, router, self.TOP_K, True
            )
            between()
            update = fused_moe(normed, *self.experts[at % 2], shares, ids)
            between()
        return update, total


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_a_chain_of_early_launches_waits_where_it_must(
    rows: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers differ in routing and in what they multiply, and a replay in its values: what is read early shows."""
    from lockstep.ops.fused_moe import hopper_down

    calls: list[int] = []
    ours = hopper_down.weighted_down

    def counted(*given: Any) -> torch.Tensor:
        calls.append(len(given))
        return ours(*given)

    monkeypatch.setattr(hopper_down, "weighted_down", counted)
    chain = Mixtures(seed, rows, num_layers=12)
    expected = chain.run(torch.cuda.synchronize)
    assert len(calls) == 12, "another kernel computed it"
    for _ in range(20):
        assert same(chain.run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain.run()
    for _ in range(20):
        graph.replay()
        assert same(recorded, expected)
    for factor in (-1, 0.5, 3):
        chain.stream.mul_(factor)
        graph.replay()
        assert same(recorded, chain.run(torch.cuda.synchronize))


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_is_as_near_to_the_reference_as_the_contract_wants(seed: int) -> None:
    """The whole mixture, its first product included."""
    from lockstep.ops.check import error_share
    from lockstep.ops.fused_moe.contract import CONTRACT
    from lockstep.ops.fused_moe.kernels.cuda import fused_moe
    from lockstep.ops.fused_moe.reference import fused_moe as reference

    chain = Mixtures(seed, 8, num_layers=1)
    given = routed(seed, (8, chain.EXPERTS, chain.TOP_K, chain.WIDTH, 8))
    arguments = (chain.stream, *chain.experts[0], given.shares, given.ids)
    # Twice the tolerance: the reference on bfloat16 is itself one away from exact maths.
    assert error_share(fused_moe(*arguments), reference(*arguments), CONTRACT.tolerance[torch.bfloat16]) < 2
