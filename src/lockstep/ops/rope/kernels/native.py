"""Rotation by the native extension."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_dtypes, run


def rope(
    x_TNH: torch.Tensor,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    out_dtype: torch.dtype,
    interleaved: bool = False,
    *,
    instruction_set: str,
) -> torch.Tensor:
    """See the contract."""
    out_TNH = torch.empty(x_TNH.shape, dtype=out_dtype)
    run("rope", instruction_set, x_TNH, cos_TR2, sin_TR2, interleaved, out_TNH)
    return out_TNH


KERNELS = native_kernels("rope", rope, refuses=refuses_dtypes)
