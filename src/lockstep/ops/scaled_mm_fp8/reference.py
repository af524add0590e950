"""Shapes: T rows, I inputs, O outputs; K = ceil(I / 128) blocks of inputs, B = ceil(O / 128) of outputs."""

from __future__ import annotations

import torch

BLOCK = 128
"""Inputs and outputs of a block that shares a scale. Source: DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, 3.3.2."""


def scaled_mm_fp8(
    a_TI: torch.Tensor,
    b_OI: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(a * a_scale) @ (b * b_scale)^T + bias as [T, O] in `dtype`, for e4m3 codes a and b and float32 scales.

    The scales' shapes say what shares one. Per tensor: [1, 1] and [1, 1]. Per row: [T, 1] and [O, 1]. Per block:
    [T, K] and [B, K], 1 x 128 parts of a against 128 x 128 parts of b. `bias` is in `dtype`.
    """
    a_TI = a_TI.float() * _spread(a_scale, a_TI.shape)
    b_OI = b_OI.float() * _spread(b_scale, b_OI.shape)
    out_TO = a_TI @ b_OI.T
    return (out_TO if bias_O is None else out_TO + bias_O.float()).to(dtype)


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One scale for each code, or a dim of one where all share it."""
    for dim, size in enumerate(shape):
        if scale.shape[dim] not in (1, size):
            scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return scale
