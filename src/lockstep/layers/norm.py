"""Norms that take whole values, or resolve a sum that is still owed.

Shapes: T rows, D normalised dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep.layers.build import Build
from lockstep.ops.decoder_forward.outline import NormOutline
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.placement import Partial, expect_whole, reduce


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A root-mean-square norm over a last dim of `width`, before anyone has decided which kernel computes it.

    `stored_minus_one`: the file keeps weight - 1 (Gemma); one is added when it is loaded, and the sum stays float32:
    near one, 16 bits keep fewer digits than the file does near zero.
    """

    where: str
    width: int
    eps: float
    stored_minus_one: bool = False

    def dtype(self, build: Build) -> torch.dtype:
        """Of the weight, once loaded."""
        return torch.float32 if self.stored_minus_one else build.norm_dtype or build.dtype

    def load(self, build: Build) -> NormOutline:
        """The weight, and what it is used for. Raises ModelFileError as Build.weight does."""
        weight_D = build.weight(f"{self.where}.weight", (self.width,), dtype=self.dtype(build))
        return NormOutline(weight_D + 1 if self.stored_minus_one else weight_D, self.eps)

    def is_watched(self, build: Build) -> bool:
        """True when a probe wants the norm's result, which a kernel that goes on computing never writes."""
        return build.point(self.where, _AXES) is not None


_AXES = ("token", "hidden")


class RMSNorm:
    """Root-mean-square norm of a whole tensor over its last dim. `stored_minus_one` as in NormSpec."""

    def __init__(
        self, build: Build, where: str, width: int, eps: float, *, stored_minus_one: bool = False
    ) -> None:
        self.where = where
        self._norm = NormSpec(where, width, eps, stored_minus_one).load(build)
        self._function = build.bind(
            "rms_norm", where, width=width, weight_dtype=self._norm.weight.dtype
        ).function
        self._point = build.point(where, _AXES)

    @classmethod
    def of(cls, build: Build, spec: NormSpec) -> RMSNorm:
        """The norm with a kernel of its own."""
        return cls(build, spec.where, spec.width, spec.eps, stored_minus_one=spec.stored_minus_one)

    def outline(self) -> NormOutline:
        """What it computes, for a kernel of a whole decoder."""
        return self._norm

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD: torch.Tensor = self._function(expect_whole(x_TD, self.where), self._norm.weight, self._norm.eps)
        if self._point is not None:
            self._point(out_TD)
        return out_TD


class AddRMSNorm:
    """Adds an update to the residual stream and normalises the sum.

    Accepts a Partial and resolves it: this is where a fused reduction belongs. Gives (normed, residual); the
    residual that was passed in must not be used again.
    """

    def __init__(
        self, build: Build, where: str, width: int, eps: float, *, stored_minus_one: bool = False
    ) -> None:
        self.where = where
        self._mesh = build.mesh
        self._norm = NormSpec(where, width, eps, stored_minus_one).load(build)
        self._function = build.bind(
            "add_rms_norm", where, width=width, weight_dtype=self._norm.weight.dtype
        ).function
        self._point = build.point(where, _AXES)

    @classmethod
    def of(cls, build: Build, spec: NormSpec) -> AddRMSNorm:
        """The norm with a kernel of its own."""
        return cls(build, spec.where, spec.width, spec.eps, stored_minus_one=spec.stored_minus_one)

    def outline(self) -> NormOutline:
        """What it computes after the sum, for a kernel of a whole decoder."""
        return self._norm

    def __call__(
        self, update: Partial | torch.Tensor, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        update_TD = whole_update(update, self._mesh, self.where)
        out_TD, total_TD = self._function(
            update_TD, expect_whole(residual_TD, self.where), self._norm.weight, self._norm.eps
        )
        if self._point is not None:
            self._point(out_TD)
        return out_TD, total_TD


def whole_update(update: Partial | torch.Tensor, mesh: Mesh, consumer: str) -> torch.Tensor:
    """What is to be added to the residual stream, its sum resolved. Raises PlacementError when it owes a gather."""
    return reduce(update, mesh) if isinstance(update, Partial) else expect_whole(update, consumer)
