"""One Triton program that reads each row once."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.rows import refuses_wide_rows


def layer_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor | None, bias_D: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.layer_norm.programs import normalise

    return normalise(x_TD, weight_D, bias_D, eps)


KERNELS = (
    Kernel(
        op="layer_norm",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=layer_norm,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses_wide_rows,
    ),
)
