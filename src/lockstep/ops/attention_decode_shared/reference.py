"""Shapes: B sequences, N query heads, K KV heads, H head dim, P pages, S page size, T tiles of R sequences."""

from __future__ import annotations

import torch

from lockstep.ops.attention_decode.reference import attention_decode


def attention_decode_shared(
    q_BNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    shared_keys_B: torch.Tensor,
    tiles_TR: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_BNH: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> None:
    """attention_decode without a window. Which sequences share which keys is a hint that changes no value.

    The sequences of a tile have the same first pages: those of the first shared_keys[b] keys, whole pages and fewer
    than num_keys[b], as many for each of the tile. A sequence is in one tile, or it shares nothing.
    """
    attention_decode(q_BNH, k_KPSH, v_KPSH, page_table_BP, num_keys_B, sinks_N, out_BNH, scale, 0, soft_cap)
