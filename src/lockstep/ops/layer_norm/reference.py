"""Shapes: T rows (any leading dims), D normalised dim."""

from __future__ import annotations

import torch


def layer_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor | None, bias_D: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dim; float32 maths, one rounding at the end.

    The variance divides by the number of elements. Without a weight it is one, without a bias zero.
    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    x_f32 = x_TD.float()
    centred = x_f32 - x_f32.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        out = out * weight_D.float()
    if bias_D is not None:
        out = out + bias_D.float()
    return out.to(x_TD.dtype)
