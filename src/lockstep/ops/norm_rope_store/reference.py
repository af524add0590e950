"""Shapes: T tokens, A all heads (N query, K key, K value heads), H head dim, R2 = H / 2, P pages, S page size."""

from __future__ import annotations

import torch

from lockstep.ops.kv_store.reference import kv_store
from lockstep.ops.rms_norm.reference import rms_norm
from lockstep.ops.rope.reference import rope


def norm_rope_store(
    heads_TAH: torch.Tensor,
    q_weight_H: torch.Tensor | None,
    k_weight_H: torch.Tensor | None,
    eps: float,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    slots_T: torch.Tensor,
    q_TNH: torch.Tensor,
) -> None:
    """Write query heads, normalised and rotated, to q; store keys, treated alike, and values in the pools.

    Weights of None leave the heads as they are before the rotation, which turns halves of whole heads (see rope). Row
    t goes to slot slots[t] of the pools, and nowhere when that is -1 (see kv_store).
    """
    num_kv_heads = k_KPSH.shape[0]
    num_heads = heads_TAH.shape[1] - 2 * num_kv_heads
    new_q_TNH, k_TKH, v_TKH = heads_TAH.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight_H is not None:
        new_q_TNH = rms_norm(new_q_TNH, q_weight_H, eps)
    if k_weight_H is not None:
        k_TKH = rms_norm(k_TKH, k_weight_H, eps)
    kv_store(rope(k_TKH, cos_TR2, sin_TR2, k_KPSH.dtype), v_TKH, k_KPSH, v_KPSH, slots_T)
    q_TNH.copy_(rope(new_q_TNH, cos_TR2, sin_TR2, q_TNH.dtype))
