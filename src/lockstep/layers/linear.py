"""Products with constant weights, column- and row-parallel.

Shapes: T rows, I inputs, O outputs (of this rank, unless said otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.core.errors import ConfigError
from lockstep.layers.build import Build, Slice
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_sharded, expect_whole

TP = "tp"


class Product:
    """x @ weight^T + bias with the kernel bound for it; knows nothing of ranks."""

    def __init__(self, build: Build, where: str, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        outputs, inputs = weight_OI.shape
        kernel = build.bind("linear", where, inputs=inputs, outputs=outputs, bias=bias_O is not None).kernel
        self._function = kernel.function
        # On the meta device there are no bytes to prepare, only shapes to check.
        prepares = kernel.prepare is not None and not weight_OI.is_meta
        self._weight: Any = kernel.prepare(weight_OI) if prepares and kernel.prepare else weight_OI
        if weight_OI.is_meta:
            self._function = torch.nn.functional.linear
        self._bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        out_TO: torch.Tensor = self._function(x_TI, self._weight, self._bias_O)
        return out_TO


def share(total: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """(start, length) of this rank's part of `total` things; parts differ by one at most. ConfigError for none."""
    start, end = rank * total // num_ranks, (rank + 1) * total // num_ranks
    if end == start:
        raise ConfigError(f"{total} cannot be shared out over --tp {num_ranks}")
    return start, end - start


@dataclass(frozen=True, slots=True)
class Part:
    """One stored weight of a product: its name, its whole size on the split side, and this rank's part of that."""

    name: str
    total: int
    start: int
    length: int

    @classmethod
    def of(cls, name: str, total: int, rank: int, num_ranks: int) -> Part:
        """This rank's fair share."""
        return cls(name, total, *share(total, rank, num_ranks))

    def as_input(self, name: str) -> Part:
        """The same part, seen by the product that reads it."""
        return Part(name, self.total, self.start, self.length)


class ColumnParallelLinear:
    """Stored weights packed into one product whose outputs are split over the axis.

    Takes a whole [T, I]; gives Sharded [T, O] on the last dim: each rank its part of each stored weight, one after
    the other. The order inside a rank is the packed one, so a Sharded with several parts is consumed by a layer
    that knows them (attention, gated activations), never gathered.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        parts: Sequence[Part],
        num_inputs: int,
        *,
        bias: bool = False,
        axis: Axis = TP,
    ) -> None:
        self.where = where
        self._axis = axis
        weights = [
            build.weight(f"{part.name}.weight", (part.total, num_inputs), Slice(0, part.start, part.length))
            for part in parts
        ]
        biases = [
            build.weight(f"{part.name}.bias", (part.total,), Slice(0, part.start, part.length))
            for part in (parts if bias else ())
        ]
        packed_bias = torch.cat(biases) if biases else None
        self._product = Product(
            build, where, weights[0] if len(weights) == 1 else torch.cat(weights), packed_bias
        )
        self._point = build.point(where, ("token", "output"), f"sharded:{axis}:1")

    def __call__(self, x_TI: torch.Tensor) -> Sharded:
        out_TO = self._product(expect_whole(x_TI, self.where))
        if self._point is not None:
            self._point(out_TO)
        return Sharded(out_TO, self._axis, -1, self.where)


class RowParallelLinear:
    """A product whose inputs are split over the axis: takes Sharded [T, I], gives Partial [T, O].

    The bias belongs to the first rank, so that the sum counts it once.
    """

    def __init__(
        self, build: Build, where: str, part: Part, num_outputs: int, *, bias: bool = False, axis: Axis = TP
    ) -> None:
        self.where = where
        self._axis = axis
        weight_OI = build.weight(
            f"{part.name}.weight", (num_outputs, part.total), Slice(1, part.start, part.length)
        )
        is_first = build.mesh.rank(axis) == 0
        bias_O = build.weight(f"{part.name}.bias", (num_outputs,)) if bias and is_first else None
        self._product = Product(build, where, weight_OI, bias_O)
        self._point = build.point(where, ("token", "output"), f"partial:{axis}")

    def __call__(self, x: Sharded) -> Partial:
        out_TO = self._product(expect_sharded(x, self._axis, self.where))
        if self._point is not None:
            self._point(out_TO)
        return Partial(out_TO, self._axis, self.where)
