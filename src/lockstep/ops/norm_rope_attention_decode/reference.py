"""Shapes: B sequences, A all heads (N query, K key, K value heads), H head dim, R2 = H / 2, P pages, S page size."""

from __future__ import annotations

import torch

from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.norm_rope_store.reference import norm_rope_store


def norm_rope_attention_decode(
    heads_BAH: torch.Tensor,
    q_weight_H: torch.Tensor | None,
    k_weight_H: torch.Tensor | None,
    eps: float,
    cos_BR2: torch.Tensor,
    sin_BR2: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_BNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """Store the key and value of each sequence's one new token (norm_rope_store) and attend with its query
    (attention_decode).

    The new token is the last of the num_keys[b] keys of its sequence and is stored there; what the pools held in that
    slot is never read. A row without keys is padding: nothing is stored, zeros come out. No row's pages hold the slot
    that another row writes, and all other keys and values were written before the step that this call belongs to
    began: kernels may read them while the operator before this one still runs.
    """
    slots_B = new_slots(page_table_BP, num_keys_B, k_KPSH.shape[2])
    pools = (k_KPSH, v_KPSH)
    q_BNH = torch.empty_like(out_BNH)
    norm_rope_store(heads_BAH, q_weight_H, k_weight_H, eps, cos_BR2, sin_BR2, *pools, slots_B, q_BNH)
    where = (page_table_BP, num_keys_B)
    attention_decode(q_BNH, *pools, *where, sinks_N, out_BNH, scale, window, soft_cap)


def new_slots(page_table_BP: torch.Tensor, num_keys_B: torch.Tensor, page_size: int) -> torch.Tensor:
    """int64 [B]: where the last key of each sequence belongs in a pool, see kv_store; -1 where there are no keys."""
    slots = []
    for pages, num_keys in zip(page_table_BP.tolist(), num_keys_B.tolist(), strict=True):
        page, place = divmod(num_keys - 1, page_size)
        slots.append(pages[page] * page_size + place if num_keys else -1)
    return torch.tensor(slots, dtype=torch.int64, device=num_keys_B.device)
