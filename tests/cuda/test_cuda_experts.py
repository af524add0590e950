"""Experts on an NVIDIA GPU beyond their contract: every way at the sizes of a model, graphs, and who shares a step."""

from __future__ import annotations

import pytest
import torch

from lockstep.ops.check import error_share
from lockstep.ops.fused_moe.contract import CONTRACT
from lockstep.ops.fused_moe.plans import Plan, Problem, default_plan, rows_for
from lockstep.ops.fused_moe.reference import fused_moe
from lockstep.ops.grouped_gemm.tiles import Tile, default_tile, facts_of

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=60)

EXPERTS, TOP_K, WIDTH, INNER = 32, 8, 1024, 768
BY_PAIRS = (
    Plan("pairs", Tile(1, 8, 512, 4, 1), Tile(1, 8, 256, 4, 0)),
    Plan("pairs", Tile(1, 4, 512, 4, 0), Tile(1, 4, 1024, 4, 1)),
    Plan("pairs", Tile(1, 8, 256, 4, 3), Tile(1, 16, 256, 4, 3)),
)


def arguments(num_tokens: int, seed: int, device: str) -> tuple[torch.Tensor, ...]:
    """Hidden rows, both weights, shares, and ids of which some belong to other ranks."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(torch.bfloat16)

    scores = torch.rand(num_tokens, EXPERTS, generator=generator, device=device)
    ids = scores.argsort(-1)[:, :TOP_K].to(torch.int32)
    ids[torch.rand(ids.shape, generator=generator, device=device) < 0.1] = -1
    return (
        drawn(num_tokens, WIDTH),
        drawn(EXPERTS, 2 * INNER, WIDTH, scale=WIDTH**-0.5),
        drawn(EXPERTS, WIDTH, INNER, scale=INNER**-0.5),
        torch.rand(num_tokens, TOP_K, generator=generator, device=device),
        ids,
    )


def plans(num_tokens: int, device: str) -> list[Plan]:
    """One or more of each way that can compute so many tokens, and what the rules choose."""
    shared_bytes = facts_of(torch.device(device)).shared_bytes
    problem = Problem(num_tokens, EXPERTS, TOP_K, WIDTH, INNER, 2)
    found = [default_plan(problem, shared_bytes)]
    if num_tokens <= 16:
        found += BY_PAIRS
    if num_tokens <= 64:
        tile = default_tile(rows_for(num_tokens), 2, shared_bytes)
        found.append(Plan("tokens", tile, tile._replace(outputs=32)))
    for rows in (16, 64):
        tile = default_tile(rows, 2, shared_bytes)
        found.append(Plan("grouped", tile, tile._replace(outputs=64)))
    return found


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33, 64, 300])
def test_every_way_meets_the_contract(num_tokens: int, seed: int, suite_platform: str) -> None:
    from lockstep.ops.fused_moe.programs import mix_as_planned

    given = arguments(num_tokens, seed, suite_platform)
    expected = fused_moe(*given)
    for plan in plans(num_tokens, suite_platform):
        # Twice the tolerance: the reference on bfloat16 is itself one away from exact maths.
        share = error_share(mix_as_planned(plan, *given), expected, CONTRACT.tolerance[torch.bfloat16])
        assert share < 2, plan


@pytest.mark.parametrize("num_tokens", [1, 8, 24, 128])
def test_replayed_graphs_give_the_eager_bits(num_tokens: int, seed: int, suite_platform: str) -> None:
    """Several layers one after the other, so that early launches have predecessors; then other values and routing."""
    from lockstep.ops.fused_moe.programs import mix_as_planned

    for plan in plans(num_tokens, suite_platform):
        given = arguments(num_tokens, seed, suite_platform)
        others = arguments(num_tokens, seed + 1, suite_platform)

        def layers(values: tuple[torch.Tensor, ...], plan: Plan = plan) -> torch.Tensor:
            hidden, *rest = values
            for _ in range(6):
                hidden = hidden + mix_as_planned(plan, hidden, *rest)
            return hidden

        eager, eager_others = layers(given), layers(others)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layers(given)
        for _ in range(5):
            graph.replay()
            assert torch.equal(recorded, eager), plan
        for held, value in zip(given, others, strict=True):
            held.copy_(value)
        graph.replay()
        assert torch.equal(recorded, eager_others), plan


def test_a_token_does_not_see_its_company(seed: int, suite_platform: str) -> None:
    """In one plan, a token's bits are the same alone, beside others, and in another place."""
    from lockstep.ops.fused_moe.programs import mix_as_planned

    hidden, gate_up, down, shares, ids = arguments(16, seed, suite_platform)
    tile = default_tile(16, 2, facts_of(torch.device(suite_platform)).shared_bytes)
    for plan in (*BY_PAIRS, Plan("tokens", tile, tile), Plan("grouped", tile, tile)):
        together = mix_as_planned(plan, hidden, gate_up, down, shares, ids)
        for rows in (slice(5, 6), slice(3, 9)):
            alone = mix_as_planned(plan, hidden[rows], gate_up, down, shares[rows], ids[rows])
            assert torch.equal(alone, together[rows]), (plan, rows)


def test_dummies_are_the_same_on_every_device(suite_platform: str) -> None:
    from lockstep.models.loading.sources import DummyWeights

    here, there = DummyWeights(torch.device("cpu")), DummyWeights(torch.device(suite_platform))
    for dtype in (torch.bfloat16, torch.float32):
        shape = (3001, 1501)
        assert torch.equal(here.load("a", shape, dtype, None), there.load("a", shape, dtype, None).cpu())
