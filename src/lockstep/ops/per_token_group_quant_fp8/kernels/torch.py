"""Stock operators: one pass for the scales, one for the codes."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.per_token_group_quant_fp8.reference import FP8_MAX, group_scales, in_groups, new_scales


def per_token_group_quant_fp8(
    x_TD: torch.Tensor, group: int, column_major: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    x_TGE = in_groups(x_TD, group)
    largest_TG = torch.linalg.vector_norm(x_TGE, torch.inf, dim=-1, dtype=torch.float32)
    scale_TG = group_scales(largest_TG, FP8_MAX, ue8m0)
    codes_TGE = torch.mul(x_TGE, scale_TG.reciprocal()[..., None]).to(torch.float8_e4m3fn)
    if column_major:
        scale_TG = new_scales(scale_TG.shape, column_major, x_TD.device).copy_(scale_TG)
    return codes_TGE.flatten(-2).contiguous(), scale_TG


KERNELS = (
    Kernel(
        op="per_token_group_quant_fp8",
        provider="torch",
        function=per_token_group_quant_fp8,
        verified_on=("cpu", "NVIDIA H100"),
    ),
)
