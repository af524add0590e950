"""cuDNN's fused attention with one row for each sequence; see `attention_extend` for how the library is used."""

from __future__ import annotations

import torch

from lockstep.ops.attention_extend.kernels.cudnn import attention_extend, refuses
from lockstep.ops.contract import Kernel


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
    """See the contract. Lengths are read on the host; a backend plans once for all layers instead."""
    how = (scale, window, soft_cap)
    attention_extend(q_BNH, k_KPSH, v_KPSH, page_table_BP, None, num_keys_B, sinks_N, out_BNH, *how)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="cudnn",
        verified_on=("NVIDIA H100",),
        function=attention_decode,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90"}),
        refuses=refuses,
        asks_host=True,
    ),
)
