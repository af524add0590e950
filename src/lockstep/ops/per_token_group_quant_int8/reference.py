"""Shapes: T rows (one leading dim or more), D width, G groups of a row, E elements of a group."""

from __future__ import annotations

import torch

from lockstep.ops.per_token_group_quant_fp8.reference import group_scales, in_groups, new_scales

INT8_MAX = 127.0
"""The largest code in use: -128 stays unused, so that codes are as far below zero as above."""


def per_token_group_quant_int8(
    x_TD: torch.Tensor, group: int, column_major: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(contiguous codes [T, D] in int8, scales [T, D / group] in float32), such that codes * scales is about x.

    A group's scale is its largest |x| / 127, at least 2^-40; a code is x * (1 / scale), rounded to nearest even and
    in -127..127, because no |x| passes the largest. A group that holds an infinity or a NaN has codes 0 and the scale
    NaN. `ue8m0` and `column_major` are those of per_token_group_quant_fp8. Raises KernelError when `group` does not
    divide D.
    """
    x_TGE = in_groups(x_TD, group).float()
    scale_TG = group_scales(x_TGE.abs().amax(-1), INT8_MAX, ue8m0)
    codes_TGE = (x_TGE * scale_TG.reciprocal()[..., None]).round()
    codes_TGE = torch.where(scale_TG.isfinite()[..., None], codes_TGE, 0.0).to(torch.int8)
    laid_out_TG = new_scales(scale_TG.shape, column_major, x_TD.device)
    return codes_TGE.flatten(-2).contiguous(), laid_out_TG.copy_(scale_TG)
