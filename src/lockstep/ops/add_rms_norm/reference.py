"""Shapes: T rows, D normalised dim."""

from __future__ import annotations

import torch

from lockstep.ops.rms_norm.reference import rms_norm


def add_rms_norm(
    update_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(residual + update), residual + update). The sum is rounded to the dtype before the norm.

    `residual` may be overwritten with the sum; callers use the returned one.
    """
    total_TD = residual_TD + update_TD
    return rms_norm(total_TD, weight_D, eps), total_TD
