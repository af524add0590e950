"""One row of each sequence by the native extension, straight from the pages, in float32."""

from __future__ import annotations

import torch

from lockstep.ops.native import native_kernels
from lockstep.ops.native_rows import refuses_attention, run


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
    *,
    instruction_set: str,
) -> None:
    """See the contract. Raises ValueError when a page lies beyond the pool."""
    where = (page_table_BP, None, num_keys_B, sinks_N)
    run("attend", instruction_set, q_BNH, k_KPSH, v_KPSH, *where, out_BNH, scale, window, soft_cap)


KERNELS = native_kernels("attention_decode", attention_decode, refuses=refuses_attention)
