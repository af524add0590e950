"""Torch's fused operator."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rms_norm.weights import refuses_mixed_dtypes


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See the contract."""
    return torch.rms_norm(x_TD, (x_TD.shape[-1],), weight_D, eps)


KERNELS = (
    Kernel(
        op="rms_norm",
        provider="torch",
        function=rms_norm,
        refuses=refuses_mixed_dtypes,
        verified_on=("cpu", "NVIDIA H100"),
    ),
)
