"""Who belongs to which group of a mesh, against numpy's own numbering of a grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lockstep.core.errors import PlacementError
from lockstep.parallel.mesh import Mesh, lines_of

pytestmark = pytest.mark.suite("cpu")


@pytest.mark.parametrize("ep", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_lines_are_rows_of_a_grid(ep: int, tp: int) -> None:
    grid = np.arange(ep * tp).reshape(ep, tp)
    for ep_rank, tp_rank in itertools.product(range(ep), range(tp)):
        wanted = {"ep": list(grid[:, tp_rank]), "tp": list(grid[ep_rank])}
        wanted = {axis: members for axis, members in wanted.items() if len(members) > 1}
        if len(wanted) > 1:
            wanted[("ep", "tp")] = list(grid.ravel())  # type: ignore[index]
        rank = int(grid[ep_rank, tp_rank])
        found = {line.axis: line for line in lines_of({"ep": ep, "tp": tp}, rank)}
        assert set(found) == set(wanted)
        for axis, line in found.items():
            members = wanted[axis]  # type: ignore[index]
            assert (line.first, line.size, members[line.rank]) == (members[0], len(members), rank)


def test_the_product_of_large_axes_alone() -> None:
    """Between two axes one of size 1 may lie; a product that names it is the same group."""
    mesh = Mesh.shapes_only({"dp": 2, "ep": 1, "tp": 3}, rank=4)
    assert (mesh.rank("dp"), mesh.rank("ep"), mesh.rank("tp")) == (1, 0, 1)
    assert mesh.everyone.rank == 4 and mesh.everyone.size == 6
    assert mesh.size(("ep", "tp")) == 3
    assert Mesh.solo().everyone.size == 1


def test_places_that_are_not_there() -> None:
    with pytest.raises(PlacementError, match=r"a mesh of \{'ep': 2, 'tp': 2\} has no rank 4"):
        Mesh.shapes_only({"ep": 2, "tp": 2}, rank=4)
    with pytest.raises(PlacementError, match="unknown mesh axis 'tpp'; did you mean 'tp'"):
        Mesh.shapes_only({"tpp": 2}, rank=0)
