"""The gate by the native extension."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def silu_and_mul(x_T2F: torch.Tensor, *, instruction_set: str) -> torch.Tensor:
    """See the contract."""
    out_TF = torch.empty((*x_T2F.shape[:-1], x_T2F.shape[-1] // 2), dtype=x_T2F.dtype)
    run("silu_and_mul", instruction_set, x_T2F, out_TF)
    return out_TF


KERNELS = native_kernels("silu_and_mul", silu_and_mul, refuses=refuses_dtypes)
