"""Shapes: T rows, D inputs, O outputs, or 2 F of them: gate, then up."""

from __future__ import annotations

import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.linear.reference import linear
from lockstep.ops.rms_norm.reference import rms_norm
from lockstep.ops.silu_and_mul.reference import silu_and_mul


def add_norm_linear(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(linear(rms_norm(residual + update)), residual + update), and silu_and_mul of the product when `gated`.

    Without an update the stream is normalised as it is. `residual` may be overwritten with the sum; callers use the
    returned one.
    """
    if update_TD is None:
        normed_TD, total_TD = rms_norm(residual_TD, norm_weight_D, eps), residual_TD.clone()
    else:
        normed_TD, total_TD = add_rms_norm(update_TD, residual_TD, norm_weight_D, eps)
    out_TO = linear(normed_TD, weight_OD, bias_O)
    return silu_and_mul(out_TO) if gated else out_TO, total_TD
