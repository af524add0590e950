"""Values that still owe a sum or a gather: what may be done with them, and that nothing else may."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lockstep.core.errors import PlacementError
from lockstep.ops.registry import contracts, kernels
from lockstep.parallel.mesh import AXES, Mesh, ShapeGroup
from lockstep.parallel.placement import Partial, Sharded, expect_sharded, expect_whole, gather, reduce

pytestmark = pytest.mark.suite("cpu")

Placed = Partial | Sharded


def partial(axis: Any = "tp") -> Partial:
    return Partial(torch.ones(3, 8), axis, "layer.o_proj")


def sharded(axis: Any = "tp", dim: int = -1) -> Sharded:
    return Sharded(torch.ones(3, 8), axis, dim, "layer.qkv_proj")


BOTH = pytest.mark.parametrize("make", [partial, sharded], ids=["partial", "sharded"])

TORCH_USES: dict[str, Callable[[Any], Any]] = {
    "add": lambda value: torch.add(torch.ones(3, 8), value),
    "relu": torch.relu,
    "matmul": lambda value: torch.matmul(value, torch.ones(8, 2)),
    "linear": lambda value: torch.nn.functional.linear(value, torch.ones(2, 8)),
    "softmax": lambda value: torch.softmax(value, dim=-1),
    "cat of a list": lambda value: torch.cat([torch.ones(3, 8), value]),
    "stack of a tuple": lambda value: torch.stack((value, value)),
    "where, by keyword": lambda value: torch.where(torch.ones(3, 8) > 0, torch.zeros(3, 8), other=value),
    "out=": lambda value: torch.add(torch.ones(3, 8), 1, out=value),
    "a tensor's method": lambda value: torch.ones(3, 8).add_(value),
    "copy_": lambda value: torch.zeros(3, 8).copy_(value),
    "assignment into a tensor": lambda value: torch.zeros(3, 8).__setitem__(slice(None), value),
    "index by it": lambda value: torch.ones(3, 8)[value],
    "torch.tensor": lambda value: torch.tensor(value),
    "layer norm": lambda value: torch.nn.functional.layer_norm(value, (8,)),
    "attention": lambda value: torch.nn.functional.scaled_dot_product_attention(value, value, value),
}

PYTHON_USES: dict[str, Callable[[Any], Any]] = {
    "tensor +": lambda value: torch.ones(3, 8) + value,
    "+ tensor": lambda value: value + torch.ones(3, 8),
    "tensor +=": lambda value: operator.iadd(torch.ones(3, 8), value),
    "+= tensor": lambda value: operator.iadd(value, torch.ones(3, 8)),
    "+ itself": lambda value: value + value,
    "- tensor": lambda value: value - torch.ones(3, 8),
    "2 *": lambda value: 2 * value,
    "/ 2": lambda value: value / 2,
    "2 /": lambda value: 2 / value,
    "// 2": lambda value: value // 2,
    "% 2": lambda value: value % 2,
    "** 2": lambda value: value**2,
    "@": lambda value: value @ torch.ones(8, 2),
    "tensor @": lambda value: torch.ones(2, 3) @ value,
    "minus": operator.neg,
    "abs": abs,
    "==": lambda value: value == torch.ones(3, 8),
    "!=": lambda value: value != 0,
    "<": lambda value: value < 1,
    "[0]": lambda value: value[0],
    "[0] =": lambda value: operator.setitem(value, 0, 1.0),
    "len": len,
    "iteration": list,
    "truth": bool,
    "float": float,
    "in": lambda value: 1.0 in value,
    ".shape": lambda value: value.shape,
    ".dtype": lambda value: value.dtype,
    ".to": lambda value: value.to(torch.float64),
    ".view": lambda value: value.view(-1),
    "hasattr": lambda value: hasattr(value, "sum"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@BOTH
@pytest.mark.parametrize("use", [*TORCH_USES, *PYTHON_USES])
def test_nothing_else_accepts_them(make: Callable[[], Placed], use: str) -> None:
    """The message names where the value comes from, and its axis."""
    with pytest.raises(
        PlacementError, match=r"layer\.(o|qkv)_proj is (not yet reduced|sharded) over axis 'tp'"
    ):
        {**TORCH_USES, **PYTHON_USES}[use](make())


@BOTH
@pytest.mark.parametrize("op", sorted(contracts()))
def test_no_kernel_accepts_them(make: Callable[[], Placed], op: str) -> None:
    """In the place of any values of any operator."""
    generator = torch.Generator().manual_seed(0)
    calls = [(case, case.make(generator)) for case in contracts()[op].cases()]
    # The largest call, for one without rows need not look at its arguments at all.
    case, arguments = max(
        calls, key=lambda call: sum(v.numel() for v in call[1] if isinstance(v, torch.Tensor))
    )
    for kernel in kernels(op):
        if kernel.refuses(case.signature) is not None or kernel.platforms - {"cpu"}:
            continue
        prepare: list[Callable[[Any], Any]] = [
            kernel.prepare if kernel.prepare is not None and argument.constant else lambda value: value
            for argument in contracts()[op].arguments
        ]
        prepared = [made(value) for made, value in zip(prepare, arguments, strict=True)]
        for index, value in enumerate(arguments):
            # Integers are indices; a kernel may know its rows without them.
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            with pytest.raises(PlacementError):
                given = prepare[index](make())
                kernel.function(*prepared[:index], given, *prepared[index + 1 :])


@BOTH
def test_they_cannot_be_hashed_or_nested(make: Callable[[], Placed]) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        {make()}
    for kind in (lambda value: Partial(value, "tp"), lambda value: Sharded(value, "tp", 0)):
        with pytest.raises(PlacementError, match="cannot be placed again"):
            kind(make())


@pytest.mark.parametrize("size", [1, 4])
def test_reduce_once(size: int) -> None:
    """At every size of the axis, one included, so that a laptop finds what eight ranks would."""
    mesh = Mesh.shapes_only({"tp": size}, rank=0)
    value = partial()
    assert torch.equal(reduce(value, mesh), torch.ones(3, 8))
    with pytest.raises(PlacementError, match="already reduced"):
        reduce(value, mesh)
    with pytest.raises(PlacementError, match="already reduced"):
        value.take()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.ones(3, 8), "a replicated tensor owes no sum"),
        (sharded, r"layer\.qkv_proj is sharded over axis 'tp' on dim -1"),
    ],
    ids=["replicated", "sharded"],
)
def test_reduce_of_what_owes_no_sum(make: Callable[[], Any], says: str, size: int) -> None:
    with pytest.raises(PlacementError, match=says):
        reduce(make(), Mesh.shapes_only({"tp": size}, rank=0))


def test_reduce_over_the_wrong_axis() -> None:
    mesh = Mesh({"tp": ShapeGroup(0, 2), "ep": ShapeGroup(0, 2)})
    value = partial("ep")
    with pytest.raises(PlacementError, match=r"not yet reduced over axis 'ep'; it was to be reduced over 'tp'"):
        reduce(value, mesh, "tp")
    assert torch.equal(reduce(value, mesh, "ep"), torch.ones(3, 8)), (
        "a refused reduction must not take the term"
    )


def test_gather_of_what_is_not_sharded() -> None:
    for value, says in ((torch.ones(3), "whole already"), (partial(), "not yet reduced")):
        wrong: Any = value
        with pytest.raises(PlacementError, match=says):
            gather(wrong, Mesh.solo())


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_lays_slices_side_by_side(dim: int) -> None:
    value = Sharded(torch.arange(6.0).view(2, 3), "tp", dim)
    whole = gather(value, Mesh.shapes_only({"tp": 3}, rank=1))
    assert torch.equal(whole, torch.cat([torch.arange(6.0).view(2, 3)] * 3, dim))
    assert gather(value, Mesh.shapes_only({"tp": 3}, rank=1), size=5).shape[dim] == 5


def test_sharded_works_slice_by_slice() -> None:
    doubled = sharded().map(lambda local: 2 * local)
    assert isinstance(doubled, Sharded) and (doubled.axis, doubled.dim) == ("tp", -1)
    assert torch.equal(doubled.local, torch.full((3, 8), 2.0))


def test_expectations() -> None:
    assert torch.equal(expect_sharded(sharded(), "tp", "o_proj"), torch.ones(3, 8))
    assert torch.equal(expect_whole(torch.ones(2), "norm"), torch.ones(2))
    for wrong, says in (
        (torch.ones(3), "o_proj needs a value sharded over axis 'tp': a replicated tensor was given"),
        (partial(), "o_proj needs a value sharded over axis 'tp': .*not yet reduced"),
        (sharded("ep"), "o_proj needs axis 'tp': .*over axis 'ep'"),
    ):
        with pytest.raises(PlacementError, match=says):
            expect_sharded(wrong, "tp", "o_proj")
    for make in (partial, sharded):
        with pytest.raises(PlacementError, match="but norm needs a whole tensor"):
            expect_whole(make(), "norm")


def test_axes_of_a_mesh() -> None:
    tp, both = ShapeGroup(1, 4), ShapeGroup(3, 8)
    mesh = Mesh({"tp": tp, "ep": ShapeGroup(0, 2), ("ep", "tp"): both})
    assert mesh.group("tp") is tp and (mesh.size("tp"), mesh.rank("tp")) == (4, 1)
    assert mesh.group(("ep", "tp")) is both
    assert mesh.group(("tp", "dp")) is tp, "an axis of size one adds nothing to a product"
    assert all(mesh.size(axis) == 1 for axis in set(AXES) - {"tp", "ep"})
    with pytest.raises(PlacementError, match=r"unknown mesh axis 'atn_dp'; did you mean 'attn_dp'\?"):
        mesh.group("atn_dp")
    with pytest.raises(PlacementError, match=r"no group was made for the product of axes \('tp', 'ep'\)"):
        mesh.group(("tp", "ep"))


def test_a_sum_over_a_product_of_axes_is_one_operation() -> None:
    class Counting(ShapeGroup):
        calls = 0

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return tensor * self.size

    mesh = Mesh({"tp": ShapeGroup(0, 2), "ep": ShapeGroup(0, 4), ("ep", "tp"): Counting(0, 8)})
    assert torch.equal(reduce(partial(("ep", "tp")), mesh), torch.full((3, 8), 8.0)) and Counting.calls == 1
