"""One Triton program that reads both inputs once and leaves the sum in the residual."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rows import refuses_wide_rows


def add_rms_norm(
    update_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.add_rms_norm.programs import add_and_normalise

    return add_and_normalise(update_TD, residual_TD, weight_D, eps)


KERNELS = (
    Kernel(
        op="add_rms_norm",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=add_rms_norm,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_wide_rows,
    ),
)
