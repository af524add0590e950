"""Gated feed-forward blocks.

Shapes: T tokens, D model, F inner width (this rank's).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lockstep.core.errors import ModelFileError, nearest
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.linear import TP, ColumnParallelLinear, Part, RowParallelLinear
from lockstep.ops.decoder_forward.outline import MLPOutline
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial

_ACTIVATIONS: Mapping[str, tuple[str, dict[str, bool]]] = {
    "silu": ("silu_and_mul", {}),
    "gelu": ("gelu_and_mul", {"tanh": False}),
    "gelu_pytorch_tanh": ("gelu_and_mul", {"tanh": True}),
}
"""Hugging Face's activation names: the operator that multiplies by the gate in the same pass, and its flags."""


class GatedMLP:
    """down(activation(gate(x)) * up(x)). Takes a whole [T, D], gives Partial [T, D]."""

    def __init__(
        self,
        build: Build,
        where: str,
        *,
        hidden_size: int,
        inner_size: int,
        activation: str = "silu",
        bias: bool = False,
        axis: Axis = TP,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ModelFileError(f"unknown activation {activation!r}{nearest(activation, _ACTIVATIONS)}")
        group = build.mesh.group(axis)
        gate, up, down = (
            Part.of(f"{where}.{name}", inner_size, group.rank, group.size)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        self._gate_up = ColumnParallelLinear(
            build, f"{where}.gate_up_proj", (gate, up), hidden_size, bias=bias, axis=axis
        )
        self._down = RowParallelLinear(build, f"{where}.down_proj", down, hidden_size, bias=bias, axis=axis)
        op, self._flags = _ACTIVATIONS[activation]
        self._function = build.bind(op, where, width=gate.length, **self._flags).function

    def __call__(self, ctx: ForwardContext, hidden_TD: torch.Tensor) -> Partial:
        return self._down(self._gate_up(hidden_TD).map(self._activate))

    def outline(self) -> MLPOutline:
        """What it computes, for a kernel of a whole decoder."""
        return MLPOutline(self._gate_up.product.outline(), self._down.product.outline())

    def _activate(self, x_T2F: torch.Tensor) -> torch.Tensor:
        out_TF: torch.Tensor = self._function(x_T2F, *self._flags.values())
        return out_TF
