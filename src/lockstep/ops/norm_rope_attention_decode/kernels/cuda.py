"""Our own kernel for Hopper: keys of earlier tokens are on their way before the new token's heads are there.

Shapes: B sequences, A all heads (N query, K key, K value heads), H head dim, R2 = H / 2, P pages, S page size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.norm_rope_attention_decode.hopper_blocks import TILE, block_of

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
_MOST_GROUP = 8
"""Query heads of a KV head: columns of the instruction."""


def _refuses(signature: Signature) -> str | None:
    dtype, group = signature["dtype"], signature["heads"] // signature["kv_heads"]
    others = {signature["pool_dtype"], signature["weight_dtype"] or dtype}
    if dtype not in _DTYPES or others != {dtype}:
        return "heads, pools and weights of norms are all bfloat16, or all float16"
    if signature["head_dim"] not in _HEAD_DIMS or group > _MOST_GROUP:
        return f"serves heads of 64 or 128, up to {_MOST_GROUP} for a KV head, not {group} of {signature['head_dim']}"
    if signature["page_size"] % TILE:
        return f"reads {TILE} keys at a time, which pages of {signature['page_size']} are no multiple of"
    if signature["window"] or signature["soft_cap"] or signature["sinks"]:
        return "knows no windows, caps or sinks"
    from lockstep.ops.cuda_program import missing_compiler

    return missing_compiler()


def norm_rope_attention_decode(
    heads_BAH: torch.Tensor,
    q_weight_H: torch.Tensor | None,
    k_weight_H: torch.Tensor | None,
    eps: float,
    cos_BR2: torch.Tensor,
    sin_BR2: torch.Tensor,
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
    cache_dir: Path | None = None,
) -> None:
    """See the contract. Compiled kernels are kept in `cache_dir`, if one is given.

    Raises ValueError for tensors that do not lie as a decoder's do: see `can_be_attended`.
    """
    from lockstep.ops.norm_rope_attention_decode.hopper import attend, can_be_attended

    cos_sin, pools = (cos_BR2, sin_BR2), (k_KPSH, v_KPSH)
    if not can_be_attended(heads_BAH, cos_sin, pools, out_BNH):
        raise ValueError("heads of a row must lie side by side, both pools alike, and rows at even places")
    batch = heads_BAH.shape[0]
    if batch:
        weights, where = (q_weight_H, k_weight_H), (page_table_BP, num_keys_B)
        block = block_of(batch * k_KPSH.shape[0])
        attend(heads_BAH, weights, eps, cos_sin, pools, *where, out_BNH, scale, block, cache_dir)


def compile_later(
    signature: Signature, cache_dir: Path, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The kernel of each number of sequences."""
    from lockstep.ops.norm_rope_attention_decode.hopper import Heads, programs

    group, has_norms = signature["heads"] // signature["kv_heads"], signature["weight_dtype"] is not None
    sizes = (group, signature["head_dim"], signature["page_size"])
    return programs(Heads(*sizes, has_norms, signature["dtype"]), device, cache_dir)


@cache
def _with_measured(cache_dir: Path) -> Callable[..., Any]:
    return partial(norm_rope_attention_decode, cache_dir=cache_dir)


KERNELS = (
    Kernel(
        op="norm_rope_attention_decode",
        provider="cuda",
        verified_on=("NVIDIA H100",),
        function=norm_rope_attention_decode,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90", "cuda_bindings"}),
        refuses=_refuses,
        with_measured=_with_measured,
        compile_later=compile_later,
    ),
)
