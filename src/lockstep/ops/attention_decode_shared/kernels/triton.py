"""One Triton program for each tile of sequences and part of their shared keys, then attention_decode's for the rest."""

from __future__ import annotations

import torch

from lockstep.ops.attention_extend.kernels.triton import refuses as refuses_sizes
from lockstep.ops.contract import Kernel, Signature


def _refuses(signature: Signature) -> str | None:
    if signature["window"]:
        return "sees all keys of a sequence, and a layer has a window"
    return refuses_sizes(signature)


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
    """See the contract."""
    from lockstep.ops.attention_decode_shared.programs import decode_shared

    given = (q_BNH, k_KPSH, v_KPSH, page_table_BP, num_keys_B)
    decode_shared(*given, shared_keys_B, tiles_TR, sinks_N, out_BNH, scale, soft_cap)


KERNELS = (
    Kernel(
        op="attention_decode_shared",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=attention_decode_shared,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
