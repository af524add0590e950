"""Shapes: T tokens, N heads, H head dim, R rotated dims (R <= H), R2 = R / 2."""

from __future__ import annotations

import torch


def rope(
    x_TNH: torch.Tensor,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    out_dtype: torch.dtype,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate the first R dims of each head by the token's angles, pair by pair; the rest passes through.

    Pair i is (i, i + R/2), as in GPT-NeoX ("rotate half"), or (2i, 2i + 1) when `interleaved`, as in GPT-J and the
    paper. float32 maths, one rounding to `out_dtype`.
    Source: Su et al., RoFormer, 2021.
    """
    half = cos_TR2.shape[-1]
    turned, rest = x_TNH.float().split([2 * half, x_TNH.shape[-1] - 2 * half], dim=-1)
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    pair_dim = -1 if interleaved else -2
    first, second = pairs.unbind(pair_dim)
    cos_T1R2, sin_T1R2 = cos_TR2.float().unsqueeze(1), sin_TR2.float().unsqueeze(1)
    rotated = (first * cos_T1R2 - second * sin_T1R2, second * cos_T1R2 + first * sin_T1R2)
    return torch.cat((torch.stack(rotated, dim=pair_dim).flatten(-2), rest), dim=-1).to(out_dtype)
