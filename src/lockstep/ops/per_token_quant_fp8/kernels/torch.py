"""Stock operators: the group quantiser's, with rows for groups."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.per_token_group_quant_fp8.kernels.torch import per_token_group_quant_fp8


def per_token_quant_fp8(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    return per_token_group_quant_fp8(x_TD, x_TD.shape[-1], False, False)


KERNELS = (
    Kernel(
        op="per_token_quant_fp8",
        provider="torch",
        function=per_token_quant_fp8,
        verified_on=("cpu", "NVIDIA H100"),
    ),
)
