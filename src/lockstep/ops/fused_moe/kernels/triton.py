"""Alignment, a gated grouped product, a weighted one, and a sum: five Triton launches that wait for nothing."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def fused_moe(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.fused_moe.programs import mix_experts

    return mix_experts(hidden_TD, gate_up_E2FD, down_EDF, weights_TK, ids_TK)


KERNELS = (
    Kernel(
        op="fused_moe",
        provider="triton",
        function=fused_moe,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
    ),
)
