"""Keys in parts that the last program merges, in one launch of Triton, for any GPU that Triton serves."""

from __future__ import annotations

import torch

from lockstep.ops.attention_extend.kernels.triton import refuses
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
    """See the contract."""
    from lockstep.ops.attention_decode.programs import decode

    decode(q_BNH, k_KPSH, v_KPSH, page_table_BP, num_keys_B, sinks_N, out_BNH, scale, window, soft_cap)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=attention_decode,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses,
    ),
)
