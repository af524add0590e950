"""Shapes: T tokens, N heads, H head dim, R rotated dims (R <= H), R2 = R / 2."""

from __future__ import annotations

import torch


def rope(
    x_TNH: torch.Tensor, cos_TR2: torch.Tensor, sin_TR2: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Rotate pairs (i, i + R/2) of the first R dims of each head by the token's angles; the rest passes through.

    float32 maths, one rounding to `out_dtype`. The pairing is NeoX's ("rotate half").
    Source: Su et al., RoFormer, 2021.
    """
    half = cos_TR2.shape[-1]
    x_f32 = x_TNH.float()
    first, second, rest = x_f32.split([half, half, x_f32.shape[-1] - 2 * half], dim=-1)
    cos_T1R2, sin_T1R2 = cos_TR2.float().unsqueeze(1), sin_TR2.float().unsqueeze(1)
    rotated = (first * cos_T1R2 - second * sin_T1R2, second * cos_T1R2 + first * sin_T1R2, rest)
    return torch.cat(rotated, dim=-1).to(out_dtype)
