"""Two stock operators."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF).mul_(up_TF)


KERNELS = (
    Kernel(op="silu_and_mul", provider="torch", function=silu_and_mul, verified_on=("cpu", "NVIDIA H100")),
)
