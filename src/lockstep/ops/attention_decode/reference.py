"""Shapes: B sequences, N query heads, K KV heads, H head dim, P pages, S page size."""

from __future__ import annotations

import torch

from lockstep.ops.attention_extend.reference import attention_extend


def attention_decode(
    q_BNH: torch.Tensor,
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
    """Attention of one token of each sequence, its last, over its num_keys[b] keys; zeros where there are none.

    This is attention_extend with one row for each sequence; see there for windows, caps and sinks.
    """
    cu_rows = torch.arange(q_BNH.shape[0] + 1, device=q_BNH.device)
    attention_extend(
        q_BNH,
        k_KPSH,
        v_KPSH,
        page_table_BP,
        cu_rows,
        num_keys_B,
        sinks_N,
        out_BNH,
        scale,
        window,
        soft_cap,
    )
