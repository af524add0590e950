"""The fused SwiGLU that torch_musa adds to torch.nn."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature


def _refuses(signature: Signature) -> str | None:
    if not hasattr(torch.nn, "SwishGLU"):
        return "torch.nn.SwishGLU is missing; the package torch_musa brings it"
    return None


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    nn: Any = torch.nn
    out_TF: torch.Tensor = nn.SwishGLU()(x_T2F)
    return out_TF


KERNELS = (
    Kernel(
        op="silu_and_mul",
        provider="musa",
        function=silu_and_mul,
        platforms=frozenset({"musa"}),
        refuses=_refuses,
    ),
)
