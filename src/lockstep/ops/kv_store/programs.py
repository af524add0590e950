"""The Triton program of kv_store. Importing it imports Triton.

Shapes: T tokens, N KV heads, H head dim, P pages, S page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.rows import power_of_two

_MOST_ELEMENTS = 2048


@triton.jit
def _copy_heads(
    new_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    head_stride: tl.tensor,
    element_stride: tl.tensor,
    pool_head_stride: tl.tensor,
    pool_element_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Those of the heads `head` that are below `num_heads`, of one token."""
    element = tl.arange(0, BLOCK)
    mask = (head < num_heads)[:, None] & (element < HEAD_DIM)[None, :]
    new_ptrs = new_ptr + (head * head_stride)[:, None] + (element * element_stride)[None, :]
    new = tl.load(new_ptrs, mask=mask, other=0.0)
    pool_ptrs = pool_ptr + (head * pool_head_stride)[:, None] + (element * pool_element_stride)[None, :]
    tl.store(pool_ptrs, new.to(pool_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_pool_ptr: tl.tensor,
    v_pool_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_heads: tl.tensor,
    slots_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    k_element_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    v_element_stride: tl.tensor,
    k_pool_head_stride: tl.tensor,
    k_pool_page_stride: tl.tensor,
    k_pool_slot_stride: tl.tensor,
    k_pool_element_stride: tl.tensor,
    v_pool_head_stride: tl.tensor,
    v_pool_page_stride: tl.tensor,
    v_pool_slot_stride: tl.tensor,
    v_pool_element_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    K_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
) -> None:
    """HEADS heads of one token."""
    num_tiles = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    slot = tl.load(slots_ptr + token * slots_stride).to(tl.int64)
    # Of padding no head is stored; its place is any that lies in the pool.
    num_stored = tl.where(slot >= 0, num_heads, 0)
    place = tl.maximum(slot, 0)
    page, at = place // PAGE_SIZE, place % PAGE_SIZE
    head = ((tl.program_id(0) % num_tiles) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    _copy_heads(
        k_ptr + token * k_token_stride,
        k_pool_ptr + page * k_pool_page_stride + at * k_pool_slot_stride,
        head,
        num_stored,
        k_head_stride,
        k_element_stride,
        k_pool_head_stride,
        k_pool_element_stride,
        K_HEAD_DIM,
        K_BLOCK,
    )
    _copy_heads(
        v_ptr + token * v_token_stride,
        v_pool_ptr + page * v_pool_page_stride + at * v_pool_slot_stride,
        head,
        num_stored,
        v_head_stride,
        v_element_stride,
        v_pool_head_stride,
        v_pool_element_stride,
        V_HEAD_DIM,
        V_BLOCK,
    )


def store(
    k_TNH: torch.Tensor, v_TNH: torch.Tensor, k_NPSH: torch.Tensor, v_NPSH: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See the contract of kv_store."""
    num_tokens, num_heads, k_head_dim = k_TNH.shape
    v_head_dim = v_TNH.shape[-1]
    if num_tokens == 0:
        return
    k_block, v_block = power_of_two(k_head_dim), power_of_two(v_head_dim)
    heads = min(power_of_two(num_heads), max(_MOST_ELEMENTS // max(k_block, v_block), 1))
    _store[(num_tokens * triton.cdiv(num_heads, heads),)](
        k_TNH,
        v_TNH,
        k_NPSH,
        v_NPSH,
        slots_T,
        num_heads,
        slots_T.stride(0),
        *k_TNH.stride(),
        *v_TNH.stride(),
        *k_NPSH.stride(),
        *v_NPSH.stride(),
        PAGE_SIZE=k_NPSH.shape[2],
        K_HEAD_DIM=k_head_dim,
        V_HEAD_DIM=v_head_dim,
        HEADS=heads,
        K_BLOCK=k_block,
        V_BLOCK=v_block,
        # 8 elements of each for a thread: 16 bytes of a 16-bit dtype.
        num_warps=min(max(heads * max(k_block, v_block) // (32 * 8), 1), 8),
    )
