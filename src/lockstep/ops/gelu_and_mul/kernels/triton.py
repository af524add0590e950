"""The Triton program of gated activations."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def gelu_and_mul(x_T2F: torch.Tensor, tanh: bool) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.silu_and_mul.programs import GELU, GELU_TANH, activate_and_multiply

    return activate_and_multiply(x_T2F, GELU_TANH if tanh else GELU)


KERNELS = (
    Kernel(
        op="gelu_and_mul",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=gelu_and_mul,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
