"""Shapes: T tokens, N KV heads, H head dim, P pages, S page size."""

from __future__ import annotations

import torch


def kv_store(
    k_TNH: torch.Tensor, v_TNH: torch.Tensor, k_NPSH: torch.Tensor, v_NPSH: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """Write row t of k and v into slot slots[t] of the pool, rounded to the pool's dtype.

    Slot s is page s // S, place s % S. A row whose slot is -1 is padding and is written nowhere. No two other rows
    name one slot.
    """
    page_size = k_NPSH.shape[2]
    for row, slot in enumerate(slots_T.tolist()):
        if slot >= 0:
            k_NPSH[:, slot // page_size, slot % page_size] = k_TNH[row].to(k_NPSH.dtype)
            v_NPSH[:, slot // page_size, slot % page_size] = v_TNH[row].to(v_NPSH.dtype)
