"""Products with constant weights, column- and row-parallel.

Shapes: T rows, I inputs, O outputs (of this rank, unless said otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from lockstep.core.errors import ConfigError
from lockstep.layers.build import Build, Slice
from lockstep.ops.decoder_forward.outline import ProductOutline
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.linear.reference import linear
from lockstep.ops.quant_linear.reference import quant_linear
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_sharded, expect_whole

TP = "tp"


Matrix = torch.Tensor | GroupedWeight
"""A constant weight [O, I]: plain values, or the integers with scales that a file holds."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some neighbouring outputs of a product: a kernel, and the weight in the form that it reads."""

    function: Callable[..., torch.Tensor]
    weight: Any
    bias_O: torch.Tensor | None
    take_rows: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def bound(cls, build: Build, where: str, matrix: Matrix, bias_O: torch.Tensor | None) -> Piece:
        outputs, inputs = matrix.shape[0], matrix.shape[-1]
        sizes = {"inputs": inputs, "outputs": outputs, "bias": bias_O is not None}
        if isinstance(matrix, GroupedWeight):
            sizes |= {"bits": matrix.bits, "group_inputs": matrix.group_inputs}
            kernel = build.bind("quant_linear", where, **sizes).kernel
        else:
            kernel = build.bind("linear", where, **sizes).kernel
        if matrix.is_meta:
            # There are no bytes to prepare, only shapes to check.
            return cls(quant_linear if isinstance(matrix, GroupedWeight) else linear, matrix, bias_O)
        prepared = kernel.prepare(matrix) if kernel.prepare else matrix
        return cls(kernel.function, prepared, bias_O, kernel.take_rows)


class Product:
    """x @ weight^T + bias with the kernels bound for it; knows nothing of ranks.

    Weights that are given together are packed one after the other; those of one kind become one piece.
    """

    def __init__(
        self, build: Build, where: str, weights: Sequence[Matrix], bias_O: torch.Tensor | None
    ) -> None:
        self.pieces: list[Piece] = []
        first = 0
        for matrix in _merged(weights):
            outputs = matrix.shape[0]
            bias = None if bias_O is None else bias_O[first : first + outputs]
            self.pieces.append(Piece.bound(build, where, matrix, bias))
            first += outputs
        self.bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        parts = [piece.function(x_TI, piece.weight, piece.bias_O) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def outline(self) -> ProductOutline:
        """What it computes, for a kernel of a whole decoder."""
        return ProductOutline(tuple(piece.weight for piece in self.pieces), self.bias_O)


def _merged(weights: Sequence[Matrix]) -> Iterator[Matrix]:
    """Runs of one kind as one matrix."""

    def kind(matrix: Matrix) -> Any:
        return matrix.kind() if isinstance(matrix, GroupedWeight) else "plain"

    for _, run in groupby(weights, kind):
        same = list(run)
        if len(same) == 1:
            yield same[0]
        elif isinstance(same[0], GroupedWeight):
            yield GroupedWeight.concatenated([each for each in same if isinstance(each, GroupedWeight)])
        else:
            yield torch.cat([each for each in same if isinstance(each, torch.Tensor)])


def load_matrix(build: Build, name: str, shape: tuple[int, int], part: Slice | None = None) -> Matrix:
    """A stored matrix in the form that this build's kernels read best. Raises ModelFileError as Build.weight does."""
    grouped = build.grouped_weight(name, shape, part)
    return build.weight(name, shape, part) if grouped is None else grouped


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


def load_packed(
    build: Build, parts: Sequence[Part], num_inputs: int, *, bias: bool
) -> tuple[list[Matrix], torch.Tensor | None]:
    """This rank's parts of the stored weights, one after the other, and their biases as one. Raises ModelFileError."""
    slices = [Slice(0, part.start, part.length) for part in parts]
    weights = [
        load_matrix(build, f"{part.name}.weight", (part.total, num_inputs), rows)
        for part, rows in zip(parts, slices, strict=True)
    ]
    if not bias:
        return weights, None
    biases = [
        build.weight(f"{part.name}.bias", (part.total,), rows) for part, rows in zip(parts, slices, strict=True)
    ]
    return weights, torch.cat(biases)


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
        weights, packed_bias = load_packed(build, parts, num_inputs, bias=bias)
        self.product = Product(build, where, weights, packed_bias)
        self._point = build.point(where, ("token", "output"), f"sharded:{axis}:1")

    def __call__(self, x_TI: torch.Tensor) -> Sharded:
        out_TO = self.product(expect_whole(x_TI, self.where))
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
        weight_OI = load_matrix(
            build, f"{part.name}.weight", (num_outputs, part.total), Slice(1, part.start, part.length)
        )
        is_first = build.mesh.rank(axis) == 0
        bias_O = build.weight(f"{part.name}.bias", (num_outputs,)) if bias and is_first else None
        self.product = Product(build, where, (weight_OI,), bias_O)
        self._point = build.point(where, ("token", "output"), f"partial:{axis}")

    def __call__(self, x: Sharded) -> Partial:
        out_TO = self.product(expect_sharded(x, self._axis, self.where))
        if self._point is not None:
            self._point(out_TO)
        return Partial(out_TO, self._axis, self.where)
