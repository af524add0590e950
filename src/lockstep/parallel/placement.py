"""Where the parts of a value are, as a type.

A plain tensor is replicated: every rank holds all of it. `Sharded` and `Partial` wrap a tensor so that no torch
function accepts it: a value that still owes a gather or a sum cannot be used by mistake, at any size of its axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lockstep.core.errors import PlacementError
from lockstep.parallel.mesh import Axis, Mesh


class _Placed:
    """A tensor that is not whole. Everything but the functions of this file refuses it."""

    __slots__ = ("_tensor", "axis", "origin")

    def __init__(self, tensor: torch.Tensor, axis: Axis, origin: str = "") -> None:
        if isinstance(tensor, _Placed):
            raise PlacementError(f"{tensor._describe()} cannot be placed again")
        self._tensor: torch.Tensor | None = tensor
        self.axis = axis
        self.origin = origin

    def _describe(self) -> str:
        return f"{self.origin or 'a value'} is not whole on axis {self.axis!r}"

    def _refuse(self, use: str) -> NoReturn:
        raise PlacementError(f"{self._describe()}, but {use} needs a whole tensor")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        name = getattr(func, "__name__", str(func))
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, _Placed):
                    item._refuse(name)
        raise PlacementError(f"{cls.__name__} cannot be used by {name}")

    def _refuse_operator(self, *others: object) -> NoReturn:
        self._refuse("an operator")

    # Python looks operators up on the class, where __getattr__ is not asked; comparing and testing would even succeed.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse_operator
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse_operator
    __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse_operator
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __xor__ = _refuse_operator
    __getitem__ = __setitem__ = __len__ = __iter__ = __bool__ = __float__ = __int__ = _refuse_operator
    __eq__ = __ne__ = _refuse_operator
    __hash__ = None  # type: ignore[assignment]
    __copy__ = __deepcopy__ = __reduce_ex__ = _refuse_operator

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("_tensor", "axis", "origin", "dim"):
            # Asked before __init__ has set them, which torch.compile does: there is nothing to describe yet.
            raise AttributeError(name)
        self._refuse(f".{name}")


class Sharded(_Placed):
    """Each rank of `axis` holds one slice of dimension `dim`; the slices laid side by side are the value."""

    __slots__ = ("dim",)

    def __init__(self, tensor: torch.Tensor, axis: Axis, dim: int, origin: str = "") -> None:
        super().__init__(tensor, axis, origin)
        self.dim = dim

    def _describe(self) -> str:
        return f"{self.origin or 'a value'} is sharded over axis {self.axis!r} on dim {self.dim}"

    @property
    def local(self) -> torch.Tensor:
        """This rank's slice. Taking it is a statement: what follows works slice by slice."""
        assert self._tensor is not None
        return self._tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Sharded:
        """Apply a function that treats every slice alike."""
        return Sharded(function(self.local), self.axis, self.dim, self.origin)


class Partial(_Placed):
    """Each rank of `axis` holds one term; their sum is the value. It can be taken once."""

    __slots__ = ()

    def _describe(self) -> str:
        return f"{self.origin or 'a value'} is not yet reduced over axis {self.axis!r}"

    def take(self) -> torch.Tensor:
        """This rank's term, handed over for good. Raises PlacementError the second time."""
        if self._tensor is None:
            raise PlacementError(f"{self.origin or 'a value'} was already reduced over axis {self.axis!r}")
        tensor, self._tensor = self._tensor, None
        return tensor


def reduce(value: Partial, mesh: Mesh, axis: Axis | None = None) -> torch.Tensor:
    """Sum a Partial over its axis: every rank gets the whole value. May reuse the term's memory.

    Raises PlacementError for anything that owes no sum, for a second reduction, and for the wrong `axis`.
    """
    if not isinstance(value, Partial):
        what = value._describe() if isinstance(value, _Placed) else "a replicated tensor owes no sum"
        raise PlacementError(f"reduce was given something else: {what}")
    if axis is not None and axis != value.axis:
        raise PlacementError(f"{value._describe()}; it was to be reduced over {axis!r}")
    return mesh.group(value.axis).all_reduce(value.take())


def gather(value: Sharded, mesh: Mesh, *, size: int | None = None) -> torch.Tensor:
    """Lay the slices of a Sharded side by side: every rank gets the whole value, cut to `size` if given.

    Raises PlacementError for anything that is not sharded.
    """
    if not isinstance(value, Sharded):
        what = value._describe() if isinstance(value, _Placed) else "a replicated tensor is whole already"
        raise PlacementError(f"gather was given something else: {what}")
    whole = mesh.group(value.axis).all_gather(value.local, value.dim)
    return whole if size is None or whole.shape[value.dim] == size else whole.narrow(value.dim, 0, size)


def expect_sharded(value: object, axis: Axis, consumer: str) -> torch.Tensor:
    """This rank's slice of a value that must be sharded over `axis`; PlacementError otherwise."""
    if not isinstance(value, Sharded):
        what = value._describe() if isinstance(value, _Placed) else "a replicated tensor was given"
        raise PlacementError(f"{consumer} needs a value sharded over axis {axis!r}: {what}")
    if value.axis != axis:
        raise PlacementError(f"{consumer} needs axis {axis!r}: {value._describe()}")
    return value.local


def expect_whole(value: object, consumer: str) -> torch.Tensor:
    """The tensor of a replicated value; PlacementError when a sum or a gather is still owed."""
    if isinstance(value, _Placed):
        value._refuse(consumer)
    assert isinstance(value, torch.Tensor)
    return value
