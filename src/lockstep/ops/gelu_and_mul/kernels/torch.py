"""Two stock operators."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def gelu_and_mul(x_T2F: torch.Tensor, tanh: bool) -> torch.Tensor:
    """See the contract."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate_TF, approximate="tanh" if tanh else "none").mul_(up_TF)


KERNELS = (
    Kernel(op="gelu_and_mul", provider="torch", function=gelu_and_mul, verified_on=("cpu", "NVIDIA H100")),
)
