"""Stock operators: the measured part in one pass, the row in another."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def var_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    """See the contract."""
    measured = torch.linalg.vector_norm(x_TD[..., :var_hidden_size], dim=-1, keepdim=True, dtype=torch.float32)
    scale_T1 = measured.square_().div_(var_hidden_size).add_(eps).rsqrt_()
    return (x_TD * scale_T1).mul_(weight_D).to(x_TD.dtype)


KERNELS = (Kernel(op="var_rms_norm", provider="torch", function=var_rms_norm, verified_on=("cpu",)),)
