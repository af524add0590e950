"""A running softmax over pages in Triton, for any GPU that Triton serves."""

from __future__ import annotations

import torch

from lockstep.ops.attention_extend.tiles import WIDEST_GROUP, WIDEST_HEAD
from lockstep.ops.contract import Kernel, Signature


def refuses(signature: Signature) -> str | None:
    """What attention_decode and attention_extend in Triton cannot serve."""
    if signature["dtype"] != signature["pool_dtype"]:
        return f"needs queries in the pool's dtype {signature['pool_dtype']}, not {signature['dtype']}"
    if signature["head_dim"] > WIDEST_HEAD:
        return f"holds a head in registers: up to {WIDEST_HEAD} elements, not {signature['head_dim']}"
    group = signature["heads"] // signature["kv_heads"]
    if group > WIDEST_GROUP:
        return f"up to {WIDEST_GROUP} query heads may share a KV head, not {group}"
    return None


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
) -> None:
    """See the contract."""
    from lockstep.ops.attention_extend.programs import extend

    extend(
        q_TNH,
        k_KPSH,
        v_KPSH,
        page_table_BP,
        cu_rows_B1,
        num_keys_B,
        sinks_N,
        out_TNH,
        scale,
        window,
        soft_cap,
    )


KERNELS = (
    Kernel(
        op="attention_extend",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=attention_extend,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses,
    ),
)
