"""An in-place sum and torch's fused norm."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rms_norm.weights import refuses_mixed_dtypes


def add_rms_norm(
    update_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    residual_TD += update_TD
    return torch.rms_norm(residual_TD, (residual_TD.shape[-1],), weight_D, eps), residual_TD


KERNELS = (
    Kernel(
        op="add_rms_norm",
        provider="torch",
        function=add_rms_norm,
        refuses=refuses_mixed_dtypes,
        verified_on=("cpu", "NVIDIA H100"),
    ),
)
