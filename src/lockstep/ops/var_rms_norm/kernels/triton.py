"""The Triton program of rms_norm, told how much to measure."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rows import refuses_wide_rows


def var_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.rms_norm.programs import normalise

    return normalise(x_TD, weight_D, eps, var_hidden_size)


KERNELS = (
    Kernel(
        op="var_rms_norm",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=var_rms_norm,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_wide_rows,
    ),
)
