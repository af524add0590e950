"""The gate by the native extension: the exact form by a polynomial in the exponent, the other one by exp."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def gelu_and_mul(x_T2F: torch.Tensor, tanh: bool, *, instruction_set: str) -> torch.Tensor:
    """See the contract."""
    out_TF = torch.empty((*x_T2F.shape[:-1], x_T2F.shape[-1] // 2), dtype=x_T2F.dtype)
    run("gelu_and_mul", instruction_set, x_T2F, tanh, out_TF)
    return out_TF


KERNELS = native_kernels("gelu_and_mul", gelu_and_mul, refuses=refuses_dtypes)
