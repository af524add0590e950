"""The Triton programs of attention_decode: split keys, then merge the parts. Imports Triton.

M query heads of one KV head, L keys, J parts of a sequence's keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from lockstep.ops.attention_extend.programs import LOG2_E, pages_of, see_keys
from lockstep.ops.attention_extend.tiles import WHOLE_WARPS, decode_tile, num_splits, power_of_two
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs


@triton.jit
def _part_size(num_seen: tl.tensor, num_parts: tl.tensor, BLOCK_L: tl.constexpr) -> Any:
    """Keys of one part: whole turns of the loop, at least one."""
    return tl.maximum(1, tl.cdiv(tl.cdiv(num_seen, num_parts), BLOCK_L)) * BLOCK_L


# Numbers that change from step to step: no program of their own for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["window", "num_parts", "table_stride"])
def _decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    soft_cap: tl.tensor,
    num_parts: tl.tensor,
    q_strides: tl.tensor,
    out_strides: tl.tensor,
    table_stride: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Up to BLOCK_M query heads of one KV head over one part of a sequence's keys.

    IN_PARTS: leaves the part's result, normalised, and log2 of its weight, for `_merge`; else the final result.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    part = tl.program_id(2)
    num_keys = tl.load(num_keys_ptr + row)
    first_seen = 0
    if HAS_WINDOW:
        first_seen = tl.maximum(0, num_keys - window)
    keys_from = first_seen
    keys_end = num_keys
    if IN_PARTS:
        part_size = _part_size(num_keys - first_seen, num_parts, BLOCK_L)
        keys_from = first_seen + part * part_size
        keys_end = tl.minimum(keys_from + part_size, num_keys)
        if keys_from >= keys_end:
            return

    m = tl.program_id(1) % HEAD_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    head_M = kv_head * GROUP + m
    mask_MH = (m < GROUP)[:, None] & (h < HEAD_DIM)[None, :]
    q_ptr += row * q_strides[0]
    q_MH = tl.load(q_ptr + (head_M * q_strides[1])[:, None] + h[None, :], mask=mask_MH, other=0.0)
    acc_MH = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # The sink joins the first part alone.
        sink_M = tl.load(sinks_ptr + head_M, mask=m < GROUP, other=0.0).to(tl.float32)
        top_M = tl.where(part == 0, sink_M * LOG2_E, top_M)
        total_M = tl.where(part == 0, 1.0, total_M)
    position_M = tl.zeros([BLOCK_M], tl.int32) + (keys_end - 1)
    k_ptr += kv_head.to(tl.int64) * k_strides[0]
    v_ptr += kv_head.to(tl.int64) * v_strides[0]
    table_ptr += row * table_stride
    next_page_L = pages_of(keys_from, keys_end, table_ptr, PAGE_SIZE, BLOCK_L, True)
    for first_key in range(keys_from, keys_end, BLOCK_L):
        # Pages are known a turn ahead, so that keys need not wait for them.
        page_L = next_page_L
        next_page_L = pages_of(first_key + BLOCK_L, keys_end, table_ptr, PAGE_SIZE, BLOCK_L, True)
        acc_MH, top_M, total_M = see_keys(
            acc_MH,
            top_M,
            total_M,
            q_MH,
            k_ptr,
            v_ptr,
            page_L,
            first_key,
            position_M,
            keys_end,
            scale,
            window,
            soft_cap,
            k_strides,
            v_strides,
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_H,
            BLOCK_L,
            True,
            # Keys before the window are skipped, not masked: all rows stand at one position.
            False,
            HAS_SOFT_CAP,
        )
    result_MH = acc_MH / tl.where(total_M > 0, total_M, 1.0)[:, None]
    if IN_PARTS:
        place_M = (row * NUM_HEADS + head_M) * num_parts + part
        tl.store(part_ptr + (place_M * HEAD_DIM)[:, None] + h[None, :], result_MH, mask=mask_MH)
        tl.store(weight_ptr + place_M, top_M + tl.log2(total_M), mask=m < GROUP)
    else:
        out_ptr += row * out_strides[0]
        out_MH = out_ptr + (head_M * out_strides[1])[:, None] + h[None, :]
        tl.store(out_MH, result_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)


@triton.jit(do_not_specialize=["window", "num_parts"])
def _merge(
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    out_ptr: tl.tensor,
    window: tl.tensor,
    num_parts: tl.tensor,
    out_strides: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One head of one sequence: the mean of its parts, each with its weight; zeros without keys."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_seen = tl.load(num_keys_ptr + row)
    if HAS_WINDOW:
        num_seen = tl.minimum(num_seen, window)
    num_used = tl.cdiv(num_seen, _part_size(num_seen, num_parts, BLOCK_L))
    first_place = (row * tl.num_programs(1) + head) * num_parts
    h = tl.arange(0, BLOCK_H)
    acc_H = tl.zeros([BLOCK_H], tl.float32)
    top = float("-inf")
    total = 0.0
    for first in range(0, num_used, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        weight_J = tl.load(weight_ptr + first_place + j, mask=j < num_used, other=float("-inf"))
        mask_JH = (j < num_used)[:, None] & (h < HEAD_DIM)[None, :]
        part_JH = part_ptr + ((first_place + j) * HEAD_DIM)[:, None] + h[None, :]
        part_JH = tl.load(part_JH, mask=mask_JH, other=0.0)
        new_top = tl.maximum(top, tl.max(weight_J, axis=0))
        share_J = tl.exp2(weight_J - new_top)
        shrink = tl.exp2(top - new_top)
        acc_H = acc_H * shrink + tl.sum(part_JH * share_J[:, None], axis=0)
        total = total * shrink + tl.sum(share_J, axis=0)
        top = new_top
    out_H = acc_H / tl.where(total > 0, total, 1.0)
    out_ptr += row * out_strides[0] + head * out_strides[1]
    tl.store(out_ptr + h, out_H.to(out_ptr.dtype.element_ty), mask=h < HEAD_DIM)


def decode(
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
    """Launches attention_decode; see the contract. Lengths are read on the device alone."""
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    if batch == 0:
        return
    group = num_heads // num_kv_heads
    tile = decode_tile(group, head_dim, q_BNH.itemsize)
    num_head_programs = num_kv_heads * -(-group // tile.rows)
    num_parts = num_splits(batch * num_head_programs, page_table_BP.shape[1] * page_size, tile.keys)
    if num_parts == 1:
        tile = replace(tile, num_warps=max(tile.num_warps, WHOLE_WARPS))
    part_BNJH = weight_BNJ = None
    if num_parts > 1:
        part_BNJH = q_BNH.new_empty((batch, num_heads, num_parts, head_dim), dtype=torch.float32)
        weight_BNJ = q_BNH.new_empty((batch, num_heads, num_parts), dtype=torch.float32)
    block_h = power_of_two(head_dim)
    _decode[(batch, num_head_programs, num_parts)](
        q_BNH,
        k_KPSH,
        v_KPSH,
        page_table_BP,
        num_keys_B,
        sinks_N,
        out_BNH,
        part_BNJH,
        weight_BNJ,
        scale,
        window,
        soft_cap,
        num_parts,
        q_BNH.stride()[:2],
        out_BNH.stride()[:2],
        page_table_BP.stride(0),
        k_KPSH.stride()[:3],
        v_KPSH.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_M=tile.rows,
        BLOCK_L=tile.keys,
        BLOCK_H=block_h,
        HAS_WINDOW=window > 0,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks_N is not None,
        IN_PARTS=num_parts > 1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
    if num_parts > 1:
        _merge[(batch, num_heads)](
            part_BNJH,
            weight_BNJ,
            num_keys_B,
            out_BNH,
            window,
            num_parts,
            out_BNH.stride()[:2],
            HEAD_DIM=head_dim,
            BLOCK_L=tile.keys,
            BLOCK_H=block_h,
            BLOCK_J=16,
            HAS_WINDOW=window > 0,
            num_warps=4,
            **dependent_launch(),
        )
