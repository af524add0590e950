"""Column-parallel products of the normalised residual stream.

Shapes: T tokens, D model, O outputs, F gated outputs (of this rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lockstep.core.errors import ModelFileError, nearest
from lockstep.layers.build import Build
from lockstep.layers.linear import TP, ColumnParallelLinear, Matrix, Part, load_packed
from lockstep.layers.norm import AddRMSNorm, NormSpec, RMSNorm, whole_update
from lockstep.ops.contract import Kernel
from lockstep.ops.decoder_forward.outline import NormOutline, ProductOutline
from lockstep.parallel.mesh import Axis
from lockstep.parallel.placement import Partial, Sharded, expect_whole

Update = Partial | torch.Tensor | None
"""What the residual stream still lacks: a term of each rank's, a whole tensor, or nothing."""

_GATES: Mapping[str, tuple[str, dict[str, bool]]] = {
    "silu": ("silu_and_mul", {}),
    "gelu": ("gelu_and_mul", {"tanh": False}),
    "gelu_pytorch_tanh": ("gelu_and_mul", {"tanh": True}),
}
"""Hugging Face's activation names: the operator that multiplies by the gate in the same pass, and its flags."""

_Packed = tuple[Sequence[Matrix], torch.Tensor | None]


class NormedLinear:
    """product(norm(residual + update)), then activation(gate) * up of it where there is a `gate`.

    Takes the update and the residual stream [T, D], which must not be used again; gives Sharded [T, O], or [T, F] with
    a gate, and the stream with its update. An update that is Partial is resolved before it is added, whatever kernel
    adds it. By one kernel where there is one, weights are plain values, and no probe watches what lies between.

    `adds` says whether updates will come. Raises ModelFileError for a gate that is not known.
    """

    def __init__(
        self,
        build: Build,
        where: str,
        norm: NormSpec,
        parts: Sequence[Part],
        *,
        adds: bool = True,
        bias: bool = False,
        gate: str | None = None,
        axis: Axis = TP,
    ) -> None:
        if gate is not None and gate not in _GATES:
            raise ModelFileError(f"unknown activation {gate!r}{nearest(gate, _GATES)}")
        outputs = sum(part.length for part in parts)
        fused = None
        if _may_be_fused(build, where, norm, gate):
            fused = build.bind_fused(
                "add_norm_linear",
                where,
                weight_dtype=norm.dtype(build),
                inputs=norm.width,
                outputs=outputs,
                bias=bias,
                gated=gate is not None,
                adds=adds,
            )
        self._run: _FusedProduct | _ProductInParts
        if fused is not None:
            packed = load_packed(build, parts, norm.width, bias=bias)
            self._run = _FusedProduct(build, where, norm, fused.kernel, packed, gate is not None, axis)
        else:
            linear = ColumnParallelLinear(build, where, parts, norm.width, bias=bias, axis=axis)
            activation = None if gate is None else _Gate(build, where, outputs // 2, gate)
            self._run = _ProductInParts(build, norm, linear, activation, adds)

    def __call__(self, update: Update, residual_TD: torch.Tensor) -> tuple[Sharded, torch.Tensor]:
        return self._run(update, residual_TD)

    def outline(self) -> tuple[NormOutline, ProductOutline]:
        """The norm, and the product before its gate, for a kernel of a whole decoder."""
        return self._run.outline()


def _may_be_fused(build: Build, where: str, norm: NormSpec, gate: str | None) -> bool:
    """False where one kernel cannot do it, or would not write what a probe wants."""
    between = gate is not None and build.point(where, ("token", "output")) is not None
    return gate in (None, "silu") and not build.keep_grouped and not norm.is_watched(build) and not between


class _FusedProduct:
    def __init__(
        self,
        build: Build,
        where: str,
        norm: NormSpec,
        kernel: Kernel,
        packed: _Packed,
        gated: bool,
        axis: Axis,
    ) -> None:
        weights, self._bias_O = packed
        weight_OD = torch.cat([weight for weight in weights if isinstance(weight, torch.Tensor)])
        self._weight = kernel.prepare(weight_OD) if kernel.prepare and not weight_OD.is_meta else weight_OD
        self._norm = norm.load(build)
        self._function, self._gated = kernel.function, gated
        self._where, self._mesh, self._axis = where, build.mesh, axis
        self._point = build.point(where, ("token", "output"), f"sharded:{axis}:1")

    def __call__(self, update: Update, residual_TD: torch.Tensor) -> tuple[Sharded, torch.Tensor]:
        update_TD = None if update is None else whole_update(update, self._mesh, self._where)
        out_TO, residual_TD = self._function(
            update_TD,
            expect_whole(residual_TD, self._where),
            self._norm.weight,
            self._norm.eps,
            self._weight,
            self._bias_O,
            self._gated,
        )
        if self._point is not None:
            self._point(out_TO)
        return Sharded(out_TO, self._axis, -1, self._where), residual_TD

    def outline(self) -> tuple[NormOutline, ProductOutline]:
        return self._norm, ProductOutline((self._weight,), self._bias_O)


class _ProductInParts:
    def __init__(
        self, build: Build, norm: NormSpec, linear: ColumnParallelLinear, gate: _Gate | None, adds: bool
    ) -> None:
        self._linear, self._gate = linear, gate
        self._add_norm = AddRMSNorm.of(build, norm) if adds else None
        self._norm = None if adds else RMSNorm.of(build, norm)

    def __call__(self, update: Update, residual_TD: torch.Tensor) -> tuple[Sharded, torch.Tensor]:
        if self._norm is not None:
            assert update is None
            hidden_TD = self._norm(residual_TD)
        else:
            assert self._add_norm is not None and update is not None
            hidden_TD, residual_TD = self._add_norm(update, residual_TD)
        out = self._linear(hidden_TD)
        return out if self._gate is None else out.map(self._gate), residual_TD

    def outline(self) -> tuple[NormOutline, ProductOutline]:
        norm = self._norm or self._add_norm
        assert norm is not None
        return norm.outline(), self._linear.product.outline()


class _Gate:
    """activation(first half) * second half, by an operator of its own."""

    def __init__(self, build: Build, where: str, width: int, name: str) -> None:
        op, flags = _GATES[name]
        self._function = build.bind(op, where, width=width, **flags).function
        self._flags = tuple(flags.values())

    def __call__(self, x_T2F: torch.Tensor) -> torch.Tensor:
        out_TF: torch.Tensor = self._function(x_T2F, *self._flags)
        return out_TF
