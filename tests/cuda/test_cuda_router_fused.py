"""The way into a mixture as one kernel on an NVIDIA GPU, beyond its contract: tiles, near ties, early launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=60)

DEVICE = "cuda"
OP = "add_norm_route"
WIDTH, EXPERTS, TOP_K = 2048, 128, 8
UNIT = 2.0**-8
"""The most that one rounding to bfloat16 is off, as a share of the value."""

Results = tuple[torch.Tensor, ...]


class Problem:
    """Rows and a router with logits near one: many of them are equal once rounded."""

    def __init__(self, seed: int, rows: int, width: int = WIDTH, experts: int = EXPERTS) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).bfloat16()

        self.update, self.residual = drawn(rows, width), drawn(rows, width)
        self.norm, self.router = 1 + drawn(width, scale=0.1), drawn(experts, width, scale=width**-0.5)

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator. The residual is a copy, which a kernel may overwrite."""
        return self.update, self.residual.clone(), self.norm, 1e-6, self.router, TOP_K, True


def run(problem: Problem, provider: str = "triton") -> Results:
    from lockstep.ops.registry import kernels

    function = next(kernel.function for kernel in kernels(OP) if kernel.provider == provider)
    results: Results = function(*problem.arguments())
    return results


def in_parts(problem: Problem) -> Results:
    """The kernels that it stands for."""
    from lockstep.ops.add_rms_norm.kernels.triton import add_rms_norm
    from lockstep.ops.linear.kernels.triton import linear
    from lockstep.ops.moe_topk_softmax.kernels.triton import moe_topk_softmax

    update, residual, norm, eps, router, *choice = problem.arguments()
    normed, total = add_rms_norm(update, residual, norm, eps)
    return normed, total, *moe_topk_softmax(linear(normed, router), *choice)


def same(found: Results, expected: Results) -> bool:
    return all(map(torch.equal, found, expected))


def assert_best_are_chosen(problem: Problem, found: Results) -> None:
    """By the scores of exact logits of the rows that were given: no expert is chosen twice, and none was better."""
    normed, _, weights, ids = found
    logits = normed.double() @ problem.router.double().T
    chosen = logits.gather(-1, ids.long())
    best = logits.sort(-1, descending=True).values[:, :TOP_K]
    assert (
        bool((ids.sort(-1).values.diff() > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < len(logits.T)
    )
    # A choice compares two rounded logits; in float32 their sums are exact beside that.
    assert bool(((chosen - best).abs() <= 2.1 * UNIT * best.abs() + 1e-5).all())
    assert bool(((chosen.softmax(-1) - weights).abs() <= 2.1 * UNIT * chosen.abs().amax() * weights).all())


def tiles() -> list[Any]:
    from lockstep.ops.add_norm_route.tiles import Tile

    return [
        Tile(8, 16, 256, 8),
        Tile(8, 8, 256, 4),
        Tile(8, 128, 128, 8),
        Tile(8, 16, 1024, 8),
        Tile(16, 16, 256, 4),
        Tile(16, 32, 512, 8),
        Tile(32, 16, 128, 8),
        Tile(32, 64, 64, 4),
    ]


@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_kind_of_tile_and_the_same_bits_each_time(
    tile: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also widths and experts that are no whole tiles."""
    from lockstep.ops.add_norm_route.kernels import triton as chooser

    monkeypatch.setattr(chooser, "tile_of", lambda rows, inputs: tile)
    for width, experts in ((WIDTH, EXPERTS), (1000, 60), (4096, 256)):
        problem = Problem(seed, tile.rows, width, experts)
        expected = run(problem)
        total = problem.residual + problem.update
        assert torch.equal(expected[1], total)
        normed = torch.nn.functional.rms_norm(total.double(), (width,), problem.norm.double(), 1e-6)
        torch.testing.assert_close(expected[0].double(), normed, rtol=UNIT * 1.01, atol=0)
        assert_best_are_chosen(problem, expected)
        for _ in range(20):
            assert same(run(problem), expected)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 40])
def test_choices_differ_from_those_of_the_parts_for_the_order_of_sums_alone(rows: int, seed: int) -> None:
    """Rarely: few elements, and few rows."""
    num_rows = num_normed = num_routed = 0
    while num_rows < 400:
        problem = Problem(seed + num_rows, rows)
        (normed, total, weights, ids), parts = run(problem), in_parts(problem)
        assert torch.equal(total, parts[1])
        num_rows += rows
        num_normed += int((normed != parts[0]).sum())
        num_routed += int((ids != parts[3]).any(-1).sum())
        torch.testing.assert_close(weights, parts[2], rtol=8 * UNIT, atol=0)
    print(f"of {num_rows} rows {num_routed} were routed otherwise, {num_normed} elements normalised otherwise")
    assert num_normed <= 1e-3 * num_rows * WIDTH and num_routed <= 0.05 * num_rows


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows: int, seed: int) -> None:
    """Even on those that are no numbers."""
    problem = Problem(seed, rows)
    expected = run(problem)
    problem.residual[1:] = torch.nan
    found = run(problem)
    assert same(tuple(each[:1] for each in found), tuple(each[:1] for each in expected))
    assert int(found[3].min()) >= 0 and int(found[3].max()) < EXPERTS


class Chain:
    """Layers that are nothing but mixtures: every kernel reads what the one before it wrote."""

    def __init__(self, seed: int, rows: int, num_layers: int) -> None:
        self.layers = [Problem(seed + at, rows) for at in range(num_layers)]
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.gate_up, self.down = (
            (torch.randn(*shape, generator=generator, device=DEVICE) * shape[-1] ** -0.5).bfloat16()
            for shape in ((EXPERTS, 128, WIDTH), (EXPERTS, WIDTH, 64))
        )

    def run(self) -> Results:
        from lockstep.ops.fused_moe.kernels.triton import fused_moe

        update, total = self.layers[0].arguments()[:2]
        every: list[torch.Tensor] = []
        for layer in self.layers:
            normed, total, weights, ids = run_on(update, total, layer)
            update = fused_moe(normed, self.gate_up, self.down, weights, ids)
            every += (normed, total, weights, ids, update)
        return tuple(every)


def run_on(update: torch.Tensor, total: torch.Tensor, layer: Problem) -> Results:
    from lockstep.ops.add_norm_route.kernels.triton import add_norm_route

    return add_norm_route(update, total, layer.norm, 1e-6, layer.router, TOP_K, True)


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_a_chain_of_early_launches_waits_where_it_must(rows: int, seed: int) -> None:
    """Eager, again and again, and replayed: the same bits. Counters end at zero."""
    from lockstep.ops.arrivals import counters_of

    chain = Chain(seed, rows, num_layers=12)
    expected = chain.run()
    for _ in range(30):
        assert same(chain.run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain.run()
    for _ in range(30):
        for value in recorded:
            value.zero_()
        graph.replay()
        assert same(recorded, expected)
    assert not counters_of(recorded[0].device).any()
    chain.layers[0].residual.mul_(2)
    graph.replay()
    assert same(recorded, tuple(value.clone() for value in chain.run()))
