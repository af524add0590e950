"""Shapes: T rows (one leading dim or more), D width, G groups of a row, E elements of a group."""

from __future__ import annotations

import math

import torch

from lockstep.core.errors import KernelError

FP8_MAX = 448.0
"""The largest e4m3 value. Source: Micikevicius and others, FP8 Formats for Deep Learning, 2022."""

SMALLEST_SCALE = 2.0**-40
"""What a group of zeros gets: its reciprocal is finite, and no float16 value needs a smaller one."""


def per_token_group_quant_fp8(
    x_TD: torch.Tensor, group: int, column_major: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(contiguous codes [T, D] in e4m3, scales [T, D / group] in float32), such that codes * scales is about x.

    A group's scale is its largest |x| / 448, at least 2^-40; a code is x * (1 / scale), rounded to nearest even. No
    code saturates, because no |x| passes the largest. A group that holds an infinity or a NaN has NaN for its scale
    and codes. `ue8m0` rounds scales up to powers of two. `column_major` lays neighbouring rows' scales side by side,
    see `new_scales`. Raises KernelError when `group` does not divide D.
    """
    x_TGE = in_groups(x_TD, group).float()
    scale_TG = group_scales(x_TGE.abs().amax(-1), FP8_MAX, ue8m0)
    codes_TGE = (x_TGE * scale_TG.reciprocal()[..., None]).to(torch.float8_e4m3fn)
    laid_out_TG = new_scales(scale_TG.shape, column_major, x_TD.device)
    return codes_TGE.flatten(-2).contiguous(), laid_out_TG.copy_(scale_TG)


def in_groups(x_TD: torch.Tensor, group: int) -> torch.Tensor:
    """x as [T, G, E]. Raises KernelError when groups of that size do not fill a row."""
    width = x_TD.shape[-1]
    if group < 1 or width % group:
        raise KernelError(f"groups of {group} do not divide rows of {width}; choose a divisor of the width")
    return x_TD.unflatten(-1, (width // group, group))


def group_scales(largest_TG: torch.Tensor, limit: float, ue8m0: bool) -> torch.Tensor:
    """largest / limit in float32, at least 2^-40, rounded up to a power of two with `ue8m0`; NaN unless finite."""
    floored_TG = largest_TG.clamp(min=limit * SMALLEST_SCALE)
    # Divided by a tensor: some devices turn a plain number into a product with its rounded reciprocal.
    scale_TG = floored_TG / torch.full_like(floored_TG, limit)
    if ue8m0:
        # A mantissa that is not zero carries into the exponent and is cut off.
        scale_TG = ((scale_TG.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(largest_TG.isfinite(), scale_TG, torch.nan)


def new_scales(shape: torch.Size, column_major: bool, device: torch.device) -> torch.Tensor:
    """Unwritten float32 scales of the given shape [T, G].

    Row-major: a row's scales lie side by side. Column-major: those of one group of all rows (leading dims flattened)
    do, and each such column starts at a multiple of 16 bytes, as the tensor memory access of NVIDIA GPUs wants: the
    strides are (1, T rounded up to 4). The filling rows are never written.
    """
    if not column_major:
        return torch.empty(shape, dtype=torch.float32, device=device)
    *lead, num_groups = shape
    column = -(-math.prod(lead) // 4) * 4
    strides = [math.prod(lead[dim + 1 :]) for dim in range(len(lead))]
    storage = torch.empty(num_groups * column, dtype=torch.float32, device=device)
    return storage.as_strided(shape, [*strides, column])
