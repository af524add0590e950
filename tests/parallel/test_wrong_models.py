"""Models that reduce too little, too often or in the wrong place: none of them survives its first step.

The step runs on the meta device, with no weights and no devices, at one rank and at several: what is wrong on
eight cards is an error on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import LAYOUTS, Layout, TinyModel, build_over

from lockstep.attention.backend import Span
from lockstep.core.errors import PlacementError
from lockstep.layers import attention, embedding, entry, linear, mlp, norm
from lockstep.layers.linear import ColumnParallelLinear, RowParallelLinear
from lockstep.layers.norm import AddRMSNorm, RMSNorm
from lockstep.models.llm import gemma3, llama
from lockstep.models.loading.sources import ShapeWeights
from lockstep.parallel.mesh import Mesh, ShapeGroup
from lockstep.parallel.placement import Partial, Sharded, gather, reduce

pytestmark = pytest.mark.suite("cpu")

LLAMA, GEMMA = (next(each for each in LAYOUTS if each.name == name) for name in ("llama", "gemma3"))
Patch = Callable[[pytest.MonkeyPatch], None]


def run(layout: Layout, tp: int) -> None:
    mesh = Mesh({"tp": ShapeGroup(tp - 1, tp), "ep": ShapeGroup(0, 2)})
    tiny = TinyModel(build_over(mesh, ShapeWeights(), meta=True), layout.config)
    tiny.step((Span(0, 3, (0,)), Span(4, 1, (1, 2))))


def skipped(value: Any, mesh: Mesh, axis: Any = None) -> Any:
    return value


def doubled(value: Any, mesh: Mesh, axis: Any = None) -> Any:
    first: Any = reduce(value, mesh)
    return reduce(first, mesh)


def taken_twice(value: Any, mesh: Mesh, axis: Any = None) -> Any:
    reduce(value, mesh)
    return reduce(value, mesh)


def over_another_axis(value: Any, mesh: Mesh, axis: Any = None) -> Any:
    return reduce(value, mesh, "ep")


def gathered_instead(value: Any, mesh: Mesh, axis: Any = None) -> Any:
    return gather(value, mesh)


REDUCTIONS = (skipped, doubled, taken_twice, over_another_axis, gathered_instead)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("wrong", REDUCTIONS, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize(
    ("layout", "module"),
    [(LLAMA, entry), (LLAMA, norm), (GEMMA, gemma3)],
    ids=["after the embedding", "in the norm that adds", "before Gemma's norms"],
)
def test_reductions(monkeypatch: pytest.MonkeyPatch, layout: Layout, module: Any, wrong: Any, tp: int) -> None:
    monkeypatch.setattr(module, "reduce", wrong)
    with pytest.raises(PlacementError):
        run(layout, tp)


def only_the_last(right: Any, wrong: Any, num_calls: int) -> Any:
    """The right reduction but for one call."""
    calls = 0

    def reduction(value: Any, mesh: Mesh, axis: Any = None) -> Any:
        nonlocal calls
        calls += 1
        return (wrong if calls == num_calls else right)(value, mesh)

    return reduction


@pytest.mark.parametrize("num_calls", range(1, 6))
def test_one_wrong_reduction_among_many(monkeypatch: pytest.MonkeyPatch, num_calls: int) -> None:
    """Gemma reduces after its embedding and twice in each of two layers."""
    for wrong in REDUCTIONS:
        monkeypatch.setattr(gemma3, "reduce", only_the_last(reduce, wrong, num_calls))
        with pytest.raises(PlacementError):
            run(GEMMA, 2)
    monkeypatch.setattr(gemma3, "reduce", only_the_last(reduce, skipped, 6))
    run(GEMMA, 2)


def forgets_what_it_owes(patch: pytest.MonkeyPatch) -> None:
    """A row-parallel product that passes its term off as sharded."""
    original = RowParallelLinear.__call__
    patch.setattr(
        RowParallelLinear, "__call__", lambda self, x: Sharded(original(self, x).take(), "tp", -1, self.where)
    )


def adds_before_the_sum(patch: pytest.MonkeyPatch) -> None:
    """The residual stream is added to a term, so that every rank would count it."""
    original = AddRMSNorm.__call__

    def call(self: AddRMSNorm, update: Any, residual: torch.Tensor) -> Any:
        return original(self, residual + update, residual)

    patch.setattr(AddRMSNorm, "__call__", call)


def norm_eats_shards(patch: pytest.MonkeyPatch) -> None:
    """Head norms over the packed product before anyone takes this rank's slice."""
    original = attention.expect_sharded

    def expect(value: Any, axis: Any, consumer: str) -> torch.Tensor:
        HEAD_NORM(value)
        return original(value, axis, consumer)

    patch.setattr(attention, "expect_sharded", expect)


def row_parallel_of_a_whole_tensor(patch: pytest.MonkeyPatch) -> None:
    """The output product is fed this rank's rows with nothing that says so."""
    patch.setattr(attention, "Sharded", lambda tensor, *rest: tensor)


def shards_on_another_axis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "Sharded", lambda tensor, axis, *rest: Sharded(tensor, "ep", *rest))


def column_parallel_of_a_term(patch: pytest.MonkeyPatch) -> None:
    """The norm in front hands its update on without summing it."""
    patch.setattr(AddRMSNorm, "__call__", lambda self, update, residual: (update, residual))


def column_parallel_of_shards(patch: pytest.MonkeyPatch) -> None:
    """A second column-parallel product straight after the first."""
    original: Any = ColumnParallelLinear.__call__
    patch.setattr(ColumnParallelLinear, "__call__", lambda self, x: original(self, original(self, x)))


def activation_loses_the_shards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        mlp.GatedMLP,
        "__call__",
        lambda self, ctx, update, residual: (self._down(self._gate_up(update, residual)[0].local), residual),
    )


def embedding_says_nothing(patch: pytest.MonkeyPatch) -> None:
    """The embedding hands its term out as if it were whole."""
    patch.setattr(embedding, "Partial", lambda tensor, axis, where: tensor)


def embedding_on_another_axis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(entry, "reduce", lambda value, mesh: reduce(value, mesh, "tp"))
    patch.setattr(embedding, "Partial", lambda tensor, axis, where: Partial(tensor, "ep", where))


def head_of_a_term(patch: pytest.MonkeyPatch) -> None:
    """The last norm is forgotten."""
    original = llama.LlamaModel.forward

    def forward(self: Any, ctx: Any, token_ids_T: torch.Tensor) -> Any:
        self._norm = lambda update, residual: (update, residual)
        return original(self, ctx, token_ids_T)

    patch.setattr(llama.LlamaModel, "forward", forward)


def head_forgets_to_gather(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedding, "gather", lambda value, mesh, size: value)


def head_sums_instead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedding, "gather", lambda value, mesh, size: reduce(value, mesh))


HEAD_NORM = RMSNorm(build_over(Mesh.solo(), ShapeWeights(), meta=True), "head norm", 8, 1e-5)

WIRINGS: tuple[Patch, ...] = (
    forgets_what_it_owes,
    adds_before_the_sum,
    norm_eats_shards,
    row_parallel_of_a_whole_tensor,
    shards_on_another_axis,
    column_parallel_of_a_term,
    column_parallel_of_shards,
    activation_loses_the_shards,
    embedding_says_nothing,
    embedding_on_another_axis,
    head_of_a_term,
    head_forgets_to_gather,
    head_sums_instead,
)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("wire", WIRINGS, ids=lambda wire: wire.__name__)
def test_wrong_wirings(monkeypatch: pytest.MonkeyPatch, wire: Patch, tp: int) -> None:
    wire(monkeypatch)
    with pytest.raises(PlacementError):
        run(LLAMA, tp)


def test_a_sum_taken_early_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row-parallel product that reduces by itself is right where sums are optional, and an error where one is due."""
    original, mesh = RowParallelLinear.__call__, Mesh.shapes_only({"tp": 3}, rank=0)
    monkeypatch.setattr(RowParallelLinear, "__call__", lambda self, x: reduce(original(self, x), mesh))
    run(LLAMA, 3)
    with pytest.raises(PlacementError, match="a replicated tensor owes no sum"):
        run(GEMMA, 3)


def test_a_layer_on_another_axis_does_not_fit_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row-parallel product split over `ep` behind a column-parallel one split over `tp`."""
    original = linear.RowParallelLinear.__init__

    def init(self: RowParallelLinear, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "axis": "ep"})

    monkeypatch.setattr(linear.RowParallelLinear, "__init__", init)
    with pytest.raises(PlacementError, match=r"needs axis 'ep': .* over axis 'tp'"):
        run(LLAMA, 3)


@pytest.mark.parametrize("tp", [1, 3])
def test_the_models_as_they_are_pass(tp: int) -> None:
    for layout in (LLAMA, GEMMA):
        run(layout, tp)
