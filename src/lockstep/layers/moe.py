"""Mixtures of gated feed-forward experts, which are split over ranks.

Shapes: T tokens, D model, E experts (this rank's, but the router scores all), F inner width (this rank's), K experts of
each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from lockstep.core.errors import ConfigError, ModelFileError
from lockstep.layers.build import Build, ForwardContext, Place, Slice
from lockstep.layers.linear import TP, Part
from lockstep.layers.norm import NormSpec
from lockstep.layers.router import SoftmaxRouter
from lockstep.ops.fused_moe.reference import fused_moe
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial

EP = "ep"

_Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate [F, D], up [F, D] and down [D, F] of one expert."""


class MoE:
    """sum_k weight_k * expert_k(x) with x = norm(residual + update).

    Takes the update and the residual stream [T, D]; gives the next update, Partial [T, D] over both axes at once, and
    the stream with the last one.

    Whole experts are shared out over `expert_axis`, the inner width of each over `axis`. Each rank computes its
    part of the experts it holds, so that one sum over the product of the axes is all that is owed.
    Raises ConfigError when there are more ranks than things to share.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        *,
        norm: NormSpec,
        inner_size: int,
        num_experts: int,
        top_k: int,
        renormalise: bool,
        expert_axis: str = EP,
        axis: str = TP,
    ) -> None:
        self.where = where
        self._axes: Axis = (expert_axis, axis)
        self._router = SoftmaxRouter(
            build,
            f"{where}.gate",
            norm,
            num_experts=num_experts,
            top_k=top_k,
            renormalise=renormalise,
        )
        group, expert_group = build.mesh.group(axis), build.mesh.group(expert_axis)
        inner = Part.of(f"{where}.experts", inner_size, group.rank, group.size)
        self._experts = _share_of_experts(num_experts, expert_group.rank, expert_group.size)
        self._has_all = len(self._experts) == num_experts
        kernel = build.bind(
            "fused_moe",
            f"{where}.experts",
            experts=len(self._experts),
            top_k=top_k,
            width=norm.width,
            inner=inner.length,
        ).kernel
        weights = _load_experts(build, inner, norm.width, num_experts, self._experts)
        # On the meta device there are no bytes to prepare and no routing to read, only shapes to check.
        is_meta = weights[0].is_meta
        self._weights: Sequence[Any] = weights
        if kernel.prepare is not None and not is_meta:
            self._weights = [kernel.prepare(weight) for weight in weights]
        self._function: Callable[..., Any] = fused_moe if is_meta else kernel.function
        self._point = build.point(where, ("token", "output"), f"partial:{expert_axis},{axis}")

    def __call__(
        self, ctx: ForwardContext, update: Partial | torch.Tensor, residual_TD: torch.Tensor
    ) -> tuple[Partial, torch.Tensor]:
        hidden_TD, residual_TD, weights_TK, ids_TK = self._router(update, residual_TD)
        out_TD = self._function(hidden_TD, *self._weights, weights_TK, self._own_ids(ids_TK))
        if self._point is not None:
            self._point(out_TD)
        return Partial(out_TD, self._axes, self.where), residual_TD

    def _own_ids(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Ids counted from this rank's first expert; -1 for experts of other ranks."""
        if self._has_all:
            return ids_TK
        is_mine_TK = (ids_TK >= self._experts.start) & (ids_TK < self._experts.stop)
        return torch.where(is_mine_TK, ids_TK - self._experts.start, -1)


def _share_of_experts(num_experts: int, rank: int, num_ranks: int) -> range:
    """This rank's experts; shares differ by one at most. Raises ConfigError for none."""
    experts = range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)
    if not experts:
        raise ConfigError(f"{num_experts} experts cannot be shared out over --ep {num_ranks}")
    return experts


def _load_experts(
    build: Build, inner: Part, hidden_size: int, num_experts: int, experts: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [E, 2F, D] and down [E, D, F] of these experts, in whichever of three ways the file keeps them."""

    start, length, total = inner.start, inner.length, inner.total
    options: dict[str, Any] = {"dtype": build.dtype, "device": build.device}
    gate_up_E2FD = torch.empty(len(experts), 2 * length, hidden_size, **options)
    down_EDF = torch.empty(len(experts), hidden_size, length, **options)

    def targets(expert: int) -> _Expert:
        gate_up_2FD = gate_up_E2FD[expert - experts.start]
        return gate_up_2FD[:length], gate_up_2FD[length:], down_EDF[expert - experts.start]

    def one_by_one(expert: int) -> Iterator[Place]:
        gate_FD, up_FD, down_DF = targets(expert)
        rows, columns = Slice(0, start, length), Slice(1, start, length)
        name = f"{inner.name}.{expert}"
        yield Place(gate_FD, f"{name}.gate_proj.weight", (total, hidden_size), rows)
        yield Place(up_FD, f"{name}.up_proj.weight", (total, hidden_size), rows)
        yield Place(down_DF, f"{name}.down_proj.weight", (hidden_size, total), columns)

    def stacked(expert: int) -> Iterator[Place]:
        gate_FD, up_FD, down_DF = targets(expert)
        rows, columns = Slice(0, start, length, expert), Slice(1, start, length, expert)
        name, shape = inner.name, (num_experts, total, hidden_size)
        yield Place(gate_FD, f"{name}.gate_proj.weight", shape, rows)
        yield Place(up_FD, f"{name}.up_proj.weight", shape, rows)
        yield Place(down_DF, f"{name}.down_proj.weight", (num_experts, hidden_size, total), columns)

    def stacked_and_packed(expert: int) -> Iterator[Place]:
        gate_FD, up_FD, down_DF = targets(expert)
        name, shape = f"{inner.name}.gate_up_proj", (num_experts, 2 * total, hidden_size)
        columns = Slice(1, start, length, expert)
        yield Place(gate_FD, name, shape, Slice(0, start, length, expert))
        yield Place(up_FD, name, shape, Slice(0, total + start, length, expert))
        yield Place(down_DF, f"{inner.name}.down_proj", (num_experts, hidden_size, total), columns)

    build.left_to_others.update(
        f"{inner.name}.{expert}.{kind}_proj.weight"
        for expert in range(num_experts)
        if expert not in experts
        for kind in ("gate", "up", "down")
    )
    _fill_experts(build, (one_by_one, stacked, stacked_and_packed), experts)
    return gate_up_E2FD, down_EDF


def _fill_experts(build: Build, ways: Sequence[Callable[[int], Iterable[Place]]], experts: range) -> None:
    """Reads all experts in the first way that works for one. Raises the first way's ModelFileError when none does."""
    errors: list[ModelFileError] = []
    for places in ways:
        try:
            build.fill(list(places(experts[0])))
        except ModelFileError as error:
            errors.append(error)
        else:
            build.fill([place for expert in experts[1:] for place in places(expert)])
            return
    raise errors[0]
