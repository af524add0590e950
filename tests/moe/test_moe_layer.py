"""The layer on every factorisation of expert and tensor ranks against one rank, and its one reduction."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tiny_models import SeededWeights, build_over

from lockstep.core.errors import ConfigError, PlacementError
from lockstep.core.probe import ProbePoint
from lockstep.layers.build import ForwardContext
from lockstep.layers.moe import MoE
from lockstep.layers.norm import NormSpec
from lockstep.models.loading.sources import ShapeWeights
from lockstep.parallel.mesh import Axis, Group, Mesh
from lockstep.parallel.placement import Partial, reduce

pytestmark = pytest.mark.suite("cpu")

BOTH = ("ep", "tp")
SETTINGS: dict[str, Any] = {
    "norm": NormSpec("norm", 24, 1e-5),
    "inner_size": 14,
    "num_experts": 10,
    "top_k": 3,
    "renormalise": True,
}
NO_CONTEXT = cast(ForwardContext, None)


class OneOf:
    """A place in a group whose other members the test plays: it records what is summed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.summed: list[torch.Tensor] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.summed.append(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        raise AssertionError("nothing is gathered")


def mesh_of(ep_rank: int, ep: int, tp_rank: int, tp: int) -> tuple[Mesh, OneOf]:
    product = OneOf(ep_rank * tp + tp_rank, ep * tp)
    groups: dict[Axis, Group] = {"ep": OneOf(ep_rank, ep), "tp": OneOf(tp_rank, tp), BOTH: product}
    return Mesh(groups), product


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    """An update that is whole, and the residual."""
    update, residual = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))
    return update, residual


@torch.inference_mode()
def output(mesh: Mesh) -> Partial:
    layer = MoE(build_over(mesh, SeededWeights()), "mlp", **SETTINGS)
    term, total = layer(NO_CONTEXT, *streams())
    assert torch.equal(total, torch.stack(streams()).sum(0))
    return term


@pytest.mark.parametrize(("ep", "tp"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (3, 2), (2, 7), (10, 1)])
def test_every_factorisation_adds_up_to_one_rank(ep: int, tp: int) -> None:
    """Ten experts and fourteen inner units, so that shares are uneven."""
    whole = reduce(output(Mesh.solo()), Mesh.solo())
    total = torch.zeros_like(whole)
    for ep_rank in range(ep):
        for tp_rank in range(tp):
            mesh, product = mesh_of(ep_rank, ep, tp_rank, tp)
            term = output(mesh)
            assert term.axis == BOTH
            total += reduce(term, mesh)
            assert len(product.summed) == 1, "one reduction, over the product of the axes"
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    assert float(whole.std()) > 0.1


def test_a_reduction_over_one_axis_alone_is_refused() -> None:
    mesh, _ = mesh_of(0, 2, 0, 2)
    with pytest.raises(PlacementError, match=r"not yet reduced over axis \('ep', 'tp'\)"):
        reduce(output(mesh), mesh, "tp")
    with pytest.raises(PlacementError, match="no group was made for the product"):
        reduce(output(mesh), Mesh({"ep": OneOf(0, 2), "tp": OneOf(0, 2)}))


def test_an_update_that_owes_a_sum_is_summed_once_and_a_stream_that_does_is_refused() -> None:
    mesh, _ = mesh_of(0, 1, 0, 2)
    layer = MoE(build_over(mesh, SeededWeights()), "mlp", **SETTINGS)
    update, residual = streams()
    term = Partial(update, "tp", "attention")
    layer(NO_CONTEXT, term, residual)
    (summed,) = cast(OneOf, mesh.group("tp")).summed
    assert torch.equal(summed, update)
    for wrong in ((term, residual), (update, cast(torch.Tensor, Partial(residual, "tp", "attention")))):
        with pytest.raises(PlacementError, match="attention"):
            layer(NO_CONTEXT, *wrong)


def test_more_ranks_than_experts() -> None:
    with pytest.raises(ConfigError, match="10 experts cannot be shared out over --ep 11"):
        mesh, _ = mesh_of(0, 11, 0, 1)
        MoE(build_over(mesh, ShapeWeights(), meta=True), "mlp", **SETTINGS)


def test_memory_is_counted_once() -> None:
    build = build_over(Mesh.solo(), ShapeWeights(), meta=True)
    MoE(build, "mlp", **SETTINGS)
    assert build.weight_bytes == 4 * (24 + 10 * 24 + 10 * 3 * 14 * 24)


def test_expert_ranks_hold_their_experts_alone() -> None:
    weights = SeededWeights()
    mesh, _ = mesh_of(1, 3, 0, 1)
    MoE(build_over(mesh, weights), "mlp", **SETTINGS)
    assert {name.split(".")[2] for name in weights.names if ".experts." in name} == {"3", "4", "5"}


def test_probe_points_name_the_placement() -> None:
    class Seen:
        def __init__(self) -> None:
            self.points: dict[str, ProbePoint] = {}
            self.shapes: dict[str, torch.Size] = {}

        def wants(self, point: ProbePoint) -> bool:
            self.points[point.name] = point
            return True

        def record(self, point: ProbePoint, value: torch.Tensor) -> None:
            self.shapes[point.name] = value.shape

        def begin_step(self, step_id: int, rows: tuple[tuple[int, int], ...]) -> None:
            pass

    build = build_over(Mesh.solo(), SeededWeights())
    build.probe = seen = Seen()
    MoE(build, "mlp", **SETTINGS)(NO_CONTEXT, *streams())
    assert seen.points["mlp"].placement == "partial:ep,tp"
    assert seen.shapes == {"norm": (13, 24), "mlp.gate": (13, 10), "mlp": (13, 24)}
