"""The mesh: ranks arranged along named axes, and a group with collectives for each axis or product of axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from lockstep.core.errors import PlacementError, nearest

Axis = str | tuple[str, ...]
"""An axis name, or several: the product of those axes."""

AXES = ("dp", "pp", "ep", "attn_dp", "tp", "ulysses", "ring", "cfg")


class Group(Protocol):
    """Ranks that communicate. `rank` counts within the group."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, the same bits on every rank. May write into `tensor`."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's tensor (all of one shape) along `dim`, by rank."""
        ...


class SoloGroup:
    """One rank: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor


class ShapeGroup:
    """A group with no other members, for building models with no devices: shapes are right, values mean nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([tensor] * self.size, dim)


class TorchGroup:
    """Ranks of one torch process group, called directly: torch's global default group is not used.

    `wait` returns when the work it is given is done, or enqueued where devices wait for it themselves.
    """

    def __init__(
        self, process_group: torch.distributed.ProcessGroup, wait: Callable[[torch.distributed.Work], None]
    ) -> None:
        self._process_group = process_group
        self._wait = wait
        self.rank = process_group.rank()
        self.size = process_group.size()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._wait(self._process_group.allreduce([tensor]))
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(self._process_group.allgather([parts], [tensor.contiguous()]))
        return torch.cat(parts, dim)

    def abort(self) -> None:
        """Breaks off what this rank waits for on its device; the group is of no use after that."""
        self._process_group.abort()


class Line(NamedTuple):
    """The ranks that differ from one rank along `axis` alone, which is number `rank` of them.

    `first` is the lowest of their numbers in the mesh: with the axis it names the line.
    """

    axis: Axis
    rank: int
    size: int
    first: int


def lines_of(sizes: Mapping[str, int], rank: int) -> list[Line]:
    """The lines through a rank: one along each axis with several ranks, and one along the product of several such.

    Ranks are numbered from 0, the last axis fastest. Raises PlacementError for a rank or an axis that is not there.
    """
    for axis in sizes:
        _require_axis(axis)
    if not 0 <= rank < math.prod(sizes.values()):
        raise PlacementError(f"a mesh of {dict(sizes)} has no rank {rank}")
    lines: list[Line] = []
    stride = 1
    for axis, size in reversed(list(sizes.items())):
        place = rank // stride % size
        if size > 1:
            lines.insert(0, Line(axis, place, size, rank - place * stride))
        stride *= size
    if len(lines) > 1:
        lines.append(Line(tuple(str(line.axis) for line in lines), rank, stride, 0))
    return lines


def _require_axis(name: str) -> None:
    if name not in AXES:
        raise PlacementError(f"unknown mesh axis {name!r}{nearest(name, AXES)}")


class Mesh:
    """Named axes and this rank's place on each. An axis that was not given has size 1."""

    def __init__(self, groups: Mapping[Axis, Group] | None = None) -> None:
        self._groups: dict[Axis, Group] = dict(groups or {})
        self._solo = SoloGroup()

    @classmethod
    def solo(cls) -> Mesh:
        """One rank: every axis has size 1."""
        return cls()

    @classmethod
    def of(cls, sizes: Mapping[str, int], rank: int, make_group: Callable[[Line], Group]) -> Mesh:
        """The mesh of a rank, with a group for every line through it. Raises PlacementError, see `lines_of`."""
        return cls({line.axis: make_group(line) for line in lines_of(sizes, rank)})

    @classmethod
    def shapes_only(cls, sizes: Mapping[str, int], *, rank: int) -> Mesh:
        """A mesh of axes of these sizes with no other ranks behind it, for building with no devices."""
        return cls.of(sizes, rank, lambda line: ShapeGroup(line.rank, line.size))

    def abort(self) -> None:
        """Breaks off what this rank waits for on its device. May be called from any thread; nothing works after it."""
        for group in self._groups.values():
            if isinstance(group, TorchGroup):
                group.abort()

    @property
    def everyone(self) -> Group:
        """All ranks of the mesh."""
        return self.group(tuple(axis for axis in self._groups if isinstance(axis, str)))

    def group(self, axis: Axis) -> Group:
        """The group along an axis. Raises PlacementError for a name that is no axis."""
        found = self._groups.get(axis)
        if found is not None:
            return found
        names = axis if isinstance(axis, tuple) else (axis,)
        for name in names:
            _require_axis(name)
        large = [name for name in names if name in self._groups and self._groups[name].size > 1]
        if len(large) > 1:
            raise PlacementError(f"no group was made for the product of axes {tuple(large)}")
        return self._groups[large[0]] if large else self._solo

    def size(self, axis: Axis) -> int:
        """Ranks along an axis."""
        return self.group(axis).size

    def rank(self, axis: Axis) -> int:
        """This rank's place along an axis."""
        return self.group(axis).rank
