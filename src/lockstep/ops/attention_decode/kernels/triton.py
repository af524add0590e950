"""Keys in parts that the last program merges, in one launch of Triton, for any GPU that Triton serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.attention_extend.kernels.triton import refuses
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.triton_launch import compile_on, on_meta

_LONGEST = 32768
"""Keys of a sequence that few programs share: it is split as often as any."""


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


def compile_idle(signature: Signature, device: torch.device) -> Iterator[Callable[[], object]]:
    """Of few sequences keys are split in short or long parts, of many not at all: each is a program of its own."""
    dtype, heads, head_dim = signature["dtype"], signature["heads"], signature["head_dim"]
    page_size = signature["page_size"]
    pool_KPSH = on_meta(signature["kv_heads"], 16, page_size, head_dim, dtype=signature["pool_dtype"])
    sinks_N = on_meta(heads, dtype=torch.float32) if signature["sinks"] else None
    for batch in (1, 16, 256):
        q_BNH = on_meta(batch, heads, head_dim, dtype=dtype)
        tables = (
            on_meta(batch, _LONGEST // page_size, dtype=torch.int32),
            on_meta(batch, dtype=torch.int32),
        )
        for window in {0, signature["window"]}:
            how = (sinks_N, q_BNH, 1.0, window, signature["soft_cap"])
            yield compile_on(device, attention_decode, q_BNH, pool_KPSH, pool_KPSH, *tables, *how)


KERNELS = (
    Kernel(
        op="attention_decode",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=attention_decode,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=refuses,
        compile_idle=compile_idle,
    ),
)
