"""One Triton program that reads both halves once."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.silu_and_mul.programs import SILU, activate_and_multiply

    return activate_and_multiply(x_T2F, SILU)


KERNELS = (
    Kernel(
        op="silu_and_mul",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=silu_and_mul,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
