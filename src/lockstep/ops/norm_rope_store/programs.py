"""The Triton program of norm_rope_store. Importing it imports Triton.

Shapes: T tokens, A all heads (N query, K key, K value heads), H head dim, R2 = H / 2, P pages, S page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.rope.tiles import tile_of
from lockstep.ops.rows import power_of_two


@triton.jit
def _halves(
    row_ptrs: tl.tensor, element_stride: tl.tensor, mask: tl.tensor, HALF: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each row, in float32."""
    ptrs = row_ptrs + (tl.arange(0, BLOCK) * element_stride)[None, :]
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptrs + HALF * element_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write_halves(
    row_ptrs: tl.tensor,
    element_stride: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    ptrs = row_ptrs + (tl.arange(0, BLOCK) * element_stride)[None, :]
    tl.store(ptrs, first.to(row_ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF * element_stride, second.to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _store_heads(
    heads_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_pool_ptr: tl.tensor,
    v_pool_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    eps: tl.tensor,
    num_q: tl.tensor,
    num_kv: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    element_stride: tl.tensor,
    cos_token_stride: tl.tensor,
    sin_token_stride: tl.tensor,
    slots_stride: tl.tensor,
    k_pool_head_stride: tl.tensor,
    k_pool_page_stride: tl.tensor,
    k_pool_slot_stride: tl.tensor,
    k_pool_element_stride: tl.tensor,
    v_pool_head_stride: tl.tensor,
    v_pool_page_stride: tl.tensor,
    v_pool_slot_stride: tl.tensor,
    v_pool_element_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """HEADS neighbouring heads of one token, whatever they are: queries, keys, values."""
    num_heads = num_q + 2 * num_kv
    num_tiles = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    head = (tl.program_id(0) % num_tiles) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    is_pair = pair < HALF
    is_q, is_k = head < num_q, (head >= num_q) & (head < num_q + num_kv)
    is_v = (head >= num_q + num_kv) & (head < num_heads)
    if HAS_NORMS:
        one_row = tl.zeros((1, 1), tl.int32)
        q_weight_1, q_weight_2 = _halves(q_weight_ptr + one_row, 1, is_pair[None, :], HALF, BLOCK)
        k_weight_1, k_weight_2 = _halves(k_weight_ptr + one_row, 1, is_pair[None, :], HALF, BLOCK)
    wait_for_inputs(PDL, NEXT_FIRST=True)

    far_head = head.to(tl.int64)
    mask = (head < num_heads)[:, None] & is_pair[None, :]
    first, second = _halves(
        heads_ptr + token * token_stride + (far_head * head_stride)[:, None], element_stride, mask, HALF, BLOCK
    )
    cos = tl.load(cos_ptr + token * cos_token_stride + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * sin_token_stride + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots_ptr + token * slots_stride).to(tl.int64)
    x, y = first, second
    if HAS_NORMS:
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        x = first * scale * tl.where(is_q[:, None], q_weight_1, k_weight_1)
        y = second * scale * tl.where(is_q[:, None], q_weight_2, k_weight_2)
    turned_x, turned_y = x * cos - y * sin, y * cos + x * sin

    q_rows = q_ptr + (token * num_q + far_head)[:, None] * (2 * HALF)
    _write_halves(q_rows, 1, turned_x, turned_y, mask & is_q[:, None], HALF, BLOCK)
    # Of padding no head is stored; its place is any that lies in the pool.
    stored = mask & (head < tl.where(slot >= 0, num_heads, 0))[:, None]
    page, at = tl.maximum(slot, 0) // PAGE_SIZE, tl.maximum(slot, 0) % PAGE_SIZE
    k_rows = k_pool_ptr + page * k_pool_page_stride + at * k_pool_slot_stride
    k_rows += ((far_head - num_q) * k_pool_head_stride)[:, None]
    _write_halves(k_rows, k_pool_element_stride, turned_x, turned_y, stored & is_k[:, None], HALF, BLOCK)
    v_rows = v_pool_ptr + page * v_pool_page_stride + at * v_pool_slot_stride
    v_rows += ((far_head - num_q - num_kv) * v_pool_head_stride)[:, None]
    _write_halves(v_rows, v_pool_element_stride, first, second, stored & is_v[:, None], HALF, BLOCK)


def store_heads(
    heads_TAH: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    pools: tuple[torch.Tensor, torch.Tensor],
    slots_T: torch.Tensor,
    q_TNH: torch.Tensor,
) -> None:
    """See the contract of norm_rope_store. Both kinds of heads have a norm, or neither."""
    num_tokens, num_heads, head_dim = heads_TAH.shape
    k_KPSH, v_KPSH = pools
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    num_q_heads = num_heads - 2 * num_kv_heads
    cos_TR2, sin_TR2 = (table if table.stride(-1) == 1 else table.contiguous() for table in cos_sin)
    if num_tokens:
        tile = tile_of(num_tokens, num_heads, head_dim)
        _store_heads[(num_tokens * triton.cdiv(num_heads, tile.heads),)](
            heads_TAH,
            *weights,
            cos_TR2,
            sin_TR2,
            q_TNH,
            k_KPSH,
            v_KPSH,
            slots_T,
            eps,
            num_q_heads,
            num_kv_heads,
            *heads_TAH.stride(),
            cos_TR2.stride(0),
            sin_TR2.stride(0),
            slots_T.stride(0),
            *k_KPSH.stride(),
            *v_KPSH.stride(),
            PAGE_SIZE=page_size,
            HAS_NORMS=weights[0] is not None,
            HALF=head_dim // 2,
            HEADS=tile.heads,
            BLOCK=power_of_two(head_dim // 2),
            num_warps=tile.num_warps,
            **dependent_launch(),
        )
