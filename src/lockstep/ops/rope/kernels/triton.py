"""One Triton program that reads and writes each element once."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def rope(
    x_TNH: torch.Tensor,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    out_dtype: torch.dtype,
    interleaved: bool = False,
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.rope.programs import rotate

    return rotate(x_TNH, cos_TR2, sin_TR2, out_dtype, interleaved)


KERNELS = (
    Kernel(
        op="rope",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=rope,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
