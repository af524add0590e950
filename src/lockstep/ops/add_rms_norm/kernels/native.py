"""Sum and norm by the native extension; the sum replaces the residual."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def add_rms_norm(
    update_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    instruction_set: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    out_TD = torch.empty(residual_TD.shape, dtype=residual_TD.dtype)
    run("add_rms_norm", instruction_set, update_TD, residual_TD, weight_D, eps, out_TD)
    return out_TD, residual_TD


KERNELS = native_kernels("add_rms_norm", add_rms_norm, refuses=refuses_dtypes)
