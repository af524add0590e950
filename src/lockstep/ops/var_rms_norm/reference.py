"""Shapes: T rows (any leading dims), D normalised dim."""

from __future__ import annotations

import torch


def var_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    """x / sqrt(mean(x[:var_hidden_size]^2) + eps) * weight over the last dim; float32 maths, one rounding at the end.

    For rows that were widened with padding after a model was trained: the padding must not count as measurements.
    """
    x_f32 = x_TD.float()
    scale = torch.rsqrt(x_f32[..., :var_hidden_size].square().mean(-1, keepdim=True) + eps)
    return (x_f32 * scale * weight_D.float()).to(x_TD.dtype)
