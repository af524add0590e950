"""Norms by the native extension: float32 sums in several running parts."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, instruction_set: str) -> torch.Tensor:
    """See the contract."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    run("rms_norm", instruction_set, x_TD, weight_D, eps, out_TD)
    return out_TD


KERNELS = native_kernels("rms_norm", rms_norm, refuses=refuses_dtypes)
