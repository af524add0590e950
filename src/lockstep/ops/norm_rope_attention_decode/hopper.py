"""norm_rope_attention_decode on Hopper, in CUDA C++. Importing it imports NVIDIA's bindings.

Shapes: B sequences, A all heads (N query, K key, K value heads), H head dim, R2 = H / 2, P pages, S page size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import e, log2
from pathlib import Path
from typing import NamedTuple

import torch

from lockstep.ops.cuda_program import CudaProgram, Launch, architecture_of, machine_code
from lockstep.ops.hopper_attention import attention_source, tile_map
from lockstep.ops.norm_rope_attention_decode.hopper_blocks import BLOCKS, DecodeBlock, shared_bytes

_SOURCE = Path(__file__).with_name("hopper.cu")


class Heads(NamedTuple):
    """What a kernel is compiled for: query heads of a KV head, their size, slots of a page, and their norms, if any."""

    group: int
    head_dim: int
    page_size: int
    norms: bool
    dtype: torch.dtype


def source(block: DecodeBlock, heads: Heads) -> str:
    """CUDA C++ for one block."""
    facts = {
        "GROUP": heads.group,
        "HEAD_DIM": heads.head_dim,
        "PAGE": heads.page_size,
        "WARPS": block.warps,
        "STAGES": block.stages,
        "CLUSTER": block.cluster,
        "NORMS": int(heads.norms),
        "HALF": int(heads.dtype == torch.float16),
    }
    return attention_source(facts, _SOURCE.read_text())


@cache
def _program(block: DecodeBlock, heads: Heads, device: torch.device, cache_dir: Path | None) -> CudaProgram:
    shared = shared_bytes(block, heads.head_dim)
    return CudaProgram(source(block, heads), "attend", device, cache_dir, shared_bytes=shared)


def programs(heads: Heads, device: torch.device, cache_dir: Path) -> Iterator[Callable[[], object]]:
    """Of each number of sequences, as functions that compile into `cache_dir`; the most first, as an engine starts."""
    for block in reversed(BLOCKS):
        yield partial(machine_code, source(block, heads), architecture_of(device), cache_dir)


@cache
def _launch(block: DecodeBlock, num_heads: int, head_dim: int) -> Launch:
    blocks, shared = num_heads * block.cluster, shared_bytes(block, head_dim)
    return Launch(blocks, block.cluster, 32 * block.warps, shared, early=True)


def can_be_attended(
    heads_BAH: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    pools: tuple[torch.Tensor, torch.Tensor],
    out_BNH: torch.Tensor,
) -> bool:
    """Whether the kernel reads and writes tensors that lie like these: heads of a row side by side, pools alike."""
    head_dim = heads_BAH.shape[2]
    in_pairs = (heads_BAH, *cos_sin, out_BNH)
    return (
        heads_BAH.stride()[1:] == out_BNH.stride()[1:] == (head_dim, 1)
        and all(table.stride(1) == 1 for table in cos_sin)
        and all(_is_aligned(each, 2) for each in in_pairs)
        and pools[0].stride() == pools[1].stride()
        and all(pool.stride(3) == 1 and _is_aligned(pool, 16 // pool.itemsize) for pool in pools)
    )


def _is_aligned(tensor: torch.Tensor, elements: int) -> bool:
    """Whether every row begins at a multiple of so many elements."""
    lines = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    rows = all(stride % elements == 0 for size, stride in lines if size > 1)
    return rows and tensor.data_ptr() % (elements * tensor.itemsize) == 0


def attend(
    heads_BAH: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    pools: tuple[torch.Tensor, torch.Tensor],
    page_table_BP: torch.Tensor,
    num_keys_B: torch.Tensor,
    out_BNH: torch.Tensor,
    scale: float,
    block: DecodeBlock,
    cache_dir: Path | None,
) -> None:
    """See the contract; `can_be_attended` is true. The compiled kernel is kept in `cache_dir`, if one is given."""
    batch, num_heads, head_dim = heads_BAH.shape
    k_KPSH = pools[0]
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    heads = Heads(num_heads // num_kv_heads - 2, head_dim, page_size, weights[0] is not None, heads_BAH.dtype)
    tensors = (heads_BAH, *weights, *cos_sin, *pools, page_table_BP, num_keys_B, out_BNH)
    in_rows = (heads_BAH, *cos_sin, page_table_BP, out_BNH)
    _program(block, heads, heads_BAH.device, cache_dir).launch(
        _launch(block, batch * num_kv_heads, head_dim),
        (
            *map(tile_map, pools),
            *(ctypes.c_void_p(None if each is None else each.data_ptr()) for each in tensors),
            *(ctypes.c_uint64(stride) for stride in k_KPSH.stride()[:3]),
            ctypes.c_uint32(num_kv_heads),
            *(ctypes.c_uint32(each.stride(0)) for each in in_rows),
            ctypes.c_float(eps),
            ctypes.c_float(scale * log2(e)),
        ),
    )
