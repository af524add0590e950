"""One Triton program for every kind of scale."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def scaled_mm_fp8(
    a_TI: torch.Tensor,
    b_OI: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.scaled_mm_fp8.programs import scaled_product

    return scaled_product(a_TI, b_OI, a_scale, b_scale, bias_O, dtype)


KERNELS = (
    Kernel(
        op="scaled_mm_fp8",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=scaled_mm_fp8,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"fp8", "triton"}),
    ),
)
