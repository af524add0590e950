"""Shapes: T rows, D model, E experts, K experts of each row."""

from __future__ import annotations

import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.linear.reference import linear
from lockstep.ops.moe_topk_softmax.reference import moe_topk_softmax
from lockstep.ops.rms_norm.reference import rms_norm


def add_norm_route(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    router_ED: torch.Tensor,
    top_k: int,
    renormalise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """normed = rms_norm(residual + update), residual + update, and moe_topk_softmax(linear(normed, router)).

    The last is two results: weights float32 [T, K] and ids int32 [T, K]. Without an update the stream is normalised
    as it is. `residual` may be overwritten with the sum; callers use the returned one.
    """
    if update_TD is None:
        normed_TD, total_TD = rms_norm(residual_TD, norm_weight_D, eps), residual_TD.clone()
    else:
        normed_TD, total_TD = add_rms_norm(update_TD, residual_TD, norm_weight_D, eps)
    return normed_TD, total_TD, *moe_topk_softmax(linear(normed_TD, router_ED), top_k, renormalise)
