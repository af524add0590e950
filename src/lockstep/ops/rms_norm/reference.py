"""Shapes: T rows (any leading dims), D normalised dim."""

from __future__ import annotations

import torch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; float32 maths, one rounding at the end.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    x_f32 = x_TD.float()
    scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return (x_f32 * scale * weight_D.float()).to(x_TD.dtype)
