"""The Triton program of rope. Importing it imports Triton.

Shapes: T tokens, N heads, H head dim, R2 half of the rotated dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.rope.tiles import tile_of
from lockstep.ops.rows import power_of_two


@triton.jit
def _rotate(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_heads: tl.tensor,
    x_token_stride: tl.tensor,
    x_head_stride: tl.tensor,
    x_element_stride: tl.tensor,
    cos_token_stride: tl.tensor,
    sin_token_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    """HEADS heads of one token, whose angles are read once."""
    num_tiles = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    head = (tl.program_id(0) % num_tiles) * HEADS + tl.arange(0, HEADS)
    far_head = head.to(tl.int64)
    is_head = (head < num_heads)[:, None]
    x_head_ptrs = x_ptr + token * x_token_stride + (far_head * x_head_stride)[:, None]
    out_head_ptrs = out_ptr + (token * num_heads + far_head)[:, None] * HEAD_DIM
    out_dtype = out_ptr.dtype.element_ty

    pair = tl.arange(0, BLOCK_HALF)
    is_pair = pair < HALF
    cos = tl.load(cos_ptr + token * cos_token_stride + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * sin_token_stride + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        # Neighbours are read and written together and parted in registers.
        element = tl.arange(0, 2 * BLOCK_HALF)
        mask = is_head & (element < 2 * HALF)[None, :]
        x = tl.load(x_head_ptrs + (element * x_element_stride)[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (HEADS, BLOCK_HALF, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, (HEADS, 2 * BLOCK_HALF)).to(out_dtype)
        tl.store(out_head_ptrs + element[None, :], turned, mask=mask)
    else:
        mask = is_head & is_pair[None, :]
        first_ptrs = x_head_ptrs + (pair * x_element_stride)[None, :]
        first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
        second_ptrs = x_head_ptrs + ((pair + HALF) * x_element_stride)[None, :]
        second = tl.load(second_ptrs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_head_ptrs + pair[None, :]
        tl.store(out_ptrs, (first * cos - second * sin).to(out_dtype), mask=mask)
        tl.store(out_ptrs + HALF, (second * cos + first * sin).to(out_dtype), mask=mask)
    if HEAD_DIM > 2 * HALF:
        element = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = is_head & (element < HEAD_DIM)[None, :]
        rest = tl.load(x_head_ptrs + (element * x_element_stride)[None, :], mask=mask, other=0.0)
        tl.store(out_head_ptrs + element[None, :], rest.to(out_dtype), mask=mask)


def rotate(
    x_TNH: torch.Tensor,
    cos_TR2: torch.Tensor,
    sin_TR2: torch.Tensor,
    out_dtype: torch.dtype,
    interleaved: bool,
) -> torch.Tensor:
    """See the contract of rope."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    half = cos_TR2.shape[-1]
    cos_TR2, sin_TR2 = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos_TR2, sin_TR2))
    out_TNH = torch.empty(x_TNH.shape, dtype=out_dtype, device=x_TNH.device)
    if out_TNH.numel():
        tile = tile_of(num_tokens, num_heads, head_dim)
        _rotate[(num_tokens * triton.cdiv(num_heads, tile.heads),)](
            x_TNH,
            cos_TR2,
            sin_TR2,
            out_TNH,
            num_heads,
            *x_TNH.stride(),
            cos_TR2.stride(0),
            sin_TR2.stride(0),
            HEAD_DIM=head_dim,
            HALF=half,
            INTERLEAVED=interleaved,
            HEADS=tile.heads,
            BLOCK_HALF=power_of_two(half),
            BLOCK_REST=power_of_two(head_dim - 2 * half),
            num_warps=tile.num_warps,
        )
    return out_TNH
