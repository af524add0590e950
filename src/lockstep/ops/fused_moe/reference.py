"""Shapes: T tokens, D model, E experts, F inner width, K experts of each token, P = T * K pairs."""

from __future__ import annotations

import torch

from lockstep.ops.grouped_gemm.reference import grouped_gemm
from lockstep.ops.moe_align.reference import moe_align
from lockstep.ops.silu_and_mul.reference import silu_and_mul


def fused_moe(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """sum_k weights[t, k] * down[e] (silu(gate[e] h[t]) * (up[e] h[t])), e = ids[t, k], over pairs with e >= 0.

    Experts of other ranks have id -1 and add nothing. Each product and the activation round to the dtype of the
    hidden rows; the weighted outputs of a token are added in float32 and rounded once.
    """
    num_experts, _, _ = gate_up_E2FD.shape
    pairs = moe_align(ids_TK, num_experts, block_size=1)
    inner_PF = silu_and_mul(grouped_gemm(hidden_TD, gate_up_E2FD, *pairs, None, ids_TK.shape[1]))
    out_PD = grouped_gemm(inner_PF, down_EDF, *pairs, weights_TK, 1)
    return out_PD.unflatten(0, ids_TK.shape).float().sum(1).to(hidden_TD.dtype)
