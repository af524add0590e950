"""Tiles of queries by the native extension, straight from the pages: pairs of bfloat16 where the processor multiplies
them, with weights rounded to it, else float32."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_attention, run


def attention_extend(
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_TNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    *,
    instruction_set: str,
) -> None:
    """See the contract. Raises ValueError when a page lies beyond the pool."""
    where = (page_table_BP, cu_rows_B1, num_keys_B, sinks_N)
    run("attend", instruction_set, q_TNH, k_KPSH, v_KPSH, *where, out_TNH, scale, window, soft_cap)


KERNELS = native_kernels("attention_extend", attention_extend, refuses=refuses_attention)
