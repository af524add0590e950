"""Norms that take whole values, or resolve a sum that is still owed.

Shapes: T rows, D normalised dim.
"""

from __future__ import annotations

import torch

from lockstep.layers.build import Build
from lockstep.ops.decoder_forward.outline import NormOutline
from lockstep.parallel.placement import Partial, expect_whole, reduce


class RMSNorm:
    """Root-mean-square norm of a whole tensor over its last dim.

    `stored_minus_one`: the file keeps weight - 1 (Gemma); one is added when it is loaded, and the sum stays float32.
    """

    def __init__(
        self, build: Build, where: str, width: int, eps: float, *, stored_minus_one: bool = False
    ) -> None:
        self.where = where
        self._eps = eps
        self._weight_D = _weight(build, where, width, stored_minus_one)
        self._function = build.bind("rms_norm", where, width=width, weight_dtype=self._weight_D.dtype).function
        self._point = build.point(where, ("token", "hidden"))

    def outline(self) -> NormOutline:
        """What it computes, for a kernel of a whole decoder."""
        return NormOutline(self._weight_D, self._eps)

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD: torch.Tensor = self._function(expect_whole(x_TD, self.where), self._weight_D, self._eps)
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
        self._eps = eps
        self._weight_D = _weight(build, where, width, stored_minus_one)
        self._function = build.bind(
            "add_rms_norm", where, width=width, weight_dtype=self._weight_D.dtype
        ).function
        self._point = build.point(where, ("token", "hidden"))

    def outline(self) -> NormOutline:
        """What it computes after the sum, for a kernel of a whole decoder."""
        return NormOutline(self._weight_D, self._eps)

    def __call__(
        self, update: Partial | torch.Tensor, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(update, Partial):
            update_TD = reduce(update, self._mesh)
        else:
            update_TD = expect_whole(update, self.where)
        out_TD, total_TD = self._function(
            update_TD, expect_whole(residual_TD, self.where), self._weight_D, self._eps
        )
        if self._point is not None:
            self._point(out_TD)
        return out_TD, total_TD


def _weight(build: Build, where: str, width: int, stored_minus_one: bool) -> torch.Tensor:
    """In the model's dtype, unless one was added: near one, 16 bits keep fewer digits than the file does near zero."""
    if stored_minus_one:
        return build.weight(f"{where}.weight", (width,), dtype=torch.float32) + 1
    return build.weight(f"{where}.weight", (width,), dtype=build.norm_dtype)
