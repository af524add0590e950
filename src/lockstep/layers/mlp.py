"""Gated feed-forward blocks.

Shapes: T tokens, D model, F inner width (this rank's).
"""

from __future__ import annotations

import torch

from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.linear import TP, Part, RowParallelLinear
from lockstep.layers.norm import NormSpec
from lockstep.layers.normed_linear import NormedLinear, Update
from lockstep.ops.decoder_forward.outline import MLPOutline, NormOutline
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial


class GatedMLP:
    """down(activation(gate(x)) * up(x)) with x = norm(residual + update).

    Takes the update and the residual stream [T, D]; gives the next update, Partial [T, D], and the stream with the last
    one. Raises ModelFileError for an activation that is not known.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        *,
        norm: NormSpec,
        inner_size: int,
        activation: str = "silu",
        bias: bool = False,
        axis: Axis = TP,
    ) -> None:
        group = build.mesh.group(axis)
        gate, up, down = (
            Part.of(f"{where}.{name}", inner_size, group.rank, group.size)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        self._gate_up = NormedLinear(
            build, f"{where}.gate_up_proj", norm, (gate, up), bias=bias, gate=activation, axis=axis
        )
        self._down = RowParallelLinear(build, f"{where}.down_proj", down, norm.width, bias=bias, axis=axis)

    def __call__(
        self, ctx: ForwardContext, update: Update, residual_TD: torch.Tensor
    ) -> tuple[Partial, torch.Tensor]:
        inner, residual_TD = self._gate_up(update, residual_TD)
        return self._down(inner), residual_TD

    def outline(self) -> tuple[NormOutline, MLPOutline]:
        """Its norm, and what follows, for a kernel of a whole decoder."""
        norm, gate_up = self._gate_up.outline()
        return norm, MLPOutline(gate_up, self._down.product.outline())
