"""The Triton program of attention_decode: keys in parts, merged by the program that ends last. Imports Triton.

M query heads of one KV head, G of these that are merged at a time, L keys, J parts of a sequence's keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from lockstep.ops.arrivals import arrives_last, counters_of
from lockstep.ops.attention_extend.programs import LOG2_E, pages_of, see_keys
from lockstep.ops.attention_extend.tiles import (
    MERGED_HEADS,
    MERGED_PARTS,
    WHOLE_WARPS,
    decode_tile,
    least_turns,
    num_splits,
    power_of_two,
)
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.triton_launch import launch


@triton.jit
def part_size(
    num_seen: tl.tensor, num_parts: tl.tensor, BLOCK_L: tl.constexpr, LEAST_TURNS: tl.constexpr
) -> Any:
    """Keys of one part: whole turns of the loop, at least so many."""
    return tl.maximum(LEAST_TURNS, tl.cdiv(tl.cdiv(num_seen, num_parts), BLOCK_L)) * BLOCK_L


@triton.jit
def _merge(
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_m: tl.tensor,
    num_used: tl.tensor,
    num_slots: tl.tensor,
    out_head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Up to BLOCK_M heads of a group from `first_m` on: the mean of each one's used parts, each with its weight.

    The pointers are those of the group's first head, which has `num_slots` places for parts, as each one has. Parts
    are taken in their order, whoever wrote them when.
    """
    h = tl.arange(0, BLOCK_H)
    for first_head in range(first_m, tl.minimum(first_m + BLOCK_M, GROUP), BLOCK_G):
        m_G = first_head + tl.arange(0, BLOCK_G)
        is_head_G = m_G < GROUP
        # What lies beyond the heads is computed with weights that exist, and not stored.
        place_G = tl.minimum(m_G, GROUP - 1) * num_slots
        acc_GH = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
        top_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total_G = tl.zeros([BLOCK_G], tl.float32)
        for first in range(0, num_used, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            place_JG = j[:, None] + place_G[None, :]
            is_used_JG = (j < num_used)[:, None]
            weight_JG = tl.load(
                weight_ptr + place_JG, mask=is_used_JG, other=float("-inf"), cache_modifier=".cg"
            )
            mask_JGH = (is_used_JG & is_head_G[None, :])[:, :, None] & (h < HEAD_DIM)[None, None, :]
            part_JGH = part_ptr + (place_JG * HEAD_DIM)[:, :, None] + h[None, None, :]
            part_JGH = tl.load(part_JGH, mask=mask_JGH, other=0.0, cache_modifier=".cg")
            new_top_G = tl.maximum(top_G, tl.max(weight_JG, axis=0))
            share_JG = tl.exp2(weight_JG - new_top_G[None, :])
            shrink_G = tl.exp2(top_G - new_top_G)
            acc_GH = acc_GH * shrink_G[:, None] + tl.sum(part_JGH * share_JG[:, :, None], axis=0)
            total_G = total_G * shrink_G + tl.sum(share_JG, axis=0)
            top_G = new_top_G
        out_GH = (acc_GH / total_G[:, None]).to(out_ptr.dtype.element_ty)
        mask_GH = is_head_G[:, None] & (h < HEAD_DIM)[None, :]
        tl.store(out_ptr + (m_G * out_head_stride)[:, None] + h[None, :], out_GH, mask=mask_GH)


@triton.jit
def _add_part(
    result_MH: tl.tensor,
    weight_M: tl.tensor,
    part: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_m: tl.tensor,
    num_coming: tl.tensor,
    num_there: tl.tensor,
    num_slots: tl.tensor,
    out_head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ONE_COMES: tl.constexpr,
) -> None:
    """Leaves one part's results and log2 of their weights, and merges all parts where it is the last one to come.

    `num_there` parts were there before; this one is number `part` of the `num_coming` after them.
    """
    BLOCK_M: tl.constexpr = result_MH.shape[0]
    BLOCK_H: tl.constexpr = result_MH.shape[1]
    m = first_m + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    place_M = m * num_slots + num_there + part
    part_MH = part_ptr + (place_M * HEAD_DIM)[:, None] + h[None, :]
    tl.store(part_MH, result_MH, mask=(m < GROUP)[:, None] & (h < HEAD_DIM)[None, :])
    tl.store(weight_ptr + place_M, weight_M, mask=m < GROUP)
    if ONE_COMES:
        # Its own threads wrote it.
        tl.debug_barrier()
        is_last = True
    else:
        is_last = arrives_last(counter_ptr, num_coming)
    if is_last:
        _merge(
            part_ptr,
            weight_ptr,
            out_ptr,
            first_m,
            num_there + num_coming,
            num_slots,
            out_head_stride,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_G,
            BLOCK_J,
            BLOCK_H,
        )


# Numbers that change from step to step: no program of their own for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["window", "num_parts", "num_shared_parts", "num_slots", "table_stride"])
def _decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    shared_keys_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    soft_cap: tl.tensor,
    num_parts: tl.tensor,
    num_shared_parts: tl.tensor,
    num_slots: tl.tensor,
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
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ONE_COMES: tl.constexpr,
    LEAST_TURNS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Up to BLOCK_M query heads of one KV head over one part of a sequence's keys.

    IN_PARTS: of several parts, each leaves its result, normalised, and log2 of its weight; the last one merges them.
    Where `shared_keys_ptr` is given, that is how many keys others have seen, in up to `num_shared_parts` parts.
    ONE_COMES after them: then nobody counts.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    # Tables are a step's, and known before its first layer.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    part = tl.program_id(2)
    num_keys = tl.load(num_keys_ptr + row)
    first_seen = 0
    num_there = 0
    if HAS_WINDOW:
        first_seen = tl.maximum(0, num_keys - window)
    if shared_keys_ptr is not None:
        first_seen = tl.load(shared_keys_ptr + row)
        num_there = tl.cdiv(first_seen, part_size(first_seen, num_shared_parts, BLOCK_L, 1))
    keys_from = first_seen
    keys_end = num_keys
    num_used = 1
    if IN_PARTS:
        size = part_size(num_keys - first_seen, num_parts, BLOCK_L, LEAST_TURNS)
        # Without keys there is one part as well, which writes zeros.
        num_used = tl.maximum(1, tl.cdiv(num_keys - first_seen, size))
        if part >= num_used:
            wait_for_inputs(PDL)
            return
        keys_from = first_seen + part * size
        keys_end = tl.minimum(keys_from + size, num_keys)
    table_ptr += row * table_stride
    next_page_L = pages_of(keys_from, keys_end, table_ptr, PAGE_SIZE, BLOCK_L, True)
    wait_for_inputs(PDL)

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
    out_ptr += row * out_strides[0] + kv_head * GROUP * out_strides[1]
    if IN_PARTS and num_there + num_used > 1:
        first_place = (row * NUM_HEADS + kv_head * GROUP) * num_slots
        _add_part(
            result_MH,
            top_M + tl.log2(total_M),
            part,
            part_ptr + first_place * HEAD_DIM,
            weight_ptr + first_place,
            counters_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1),
            out_ptr,
            tl.program_id(1) % HEAD_BLOCKS * BLOCK_M,
            num_used,
            num_there,
            num_slots,
            out_strides[1],
            GROUP,
            HEAD_DIM,
            BLOCK_G,
            BLOCK_J,
            ONE_COMES,
        )
    else:
        out_MH = out_ptr + (m * out_strides[1])[:, None] + h[None, :]
        tl.store(out_MH, result_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)


@dataclass(frozen=True, slots=True)
class Parts:
    """Room for the results of parts, [B, N, J, H] in float32, and for log2 of their weights, [B, N, J]."""

    part_BNJH: torch.Tensor
    weight_BNJ: torch.Tensor

    @classmethod
    def empty(cls, q_BNH: torch.Tensor, num_slots: int) -> Parts:
        batch, num_heads, head_dim = q_BNH.shape
        part_BNJH = q_BNH.new_empty((batch, num_heads, num_slots, head_dim), dtype=torch.float32)
        return cls(part_BNJH, q_BNH.new_empty((batch, num_heads, num_slots), dtype=torch.float32))

    @property
    def num_slots(self) -> int:
        return self.weight_BNJ.shape[2]


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Leading keys of each sequence that were seen already: in up to `num_parts` parts, which are the first ones."""

    num_keys_B: torch.Tensor
    num_parts: int
    parts: Parts


def _num_programs(q_BNH: torch.Tensor, k_KPSH: torch.Tensor) -> int:
    """Programs that see all keys of their sequence, where these are not split."""
    batch, num_heads, head_dim = q_BNH.shape
    group = num_heads // k_KPSH.shape[0]
    return batch * k_KPSH.shape[0] * -(-group // decode_tile(group, head_dim, q_BNH.itemsize).rows)


def num_own_parts(q_BNH: torch.Tensor, k_KPSH: torch.Tensor, page_table_BP: torch.Tensor) -> int:
    """Parts that `decode` cuts the keys of each sequence into, but for those that others have seen."""
    num_kv_heads, _, page_size, head_dim = k_KPSH.shape
    keys = decode_tile(q_BNH.shape[1] // num_kv_heads, head_dim, q_BNH.itemsize).keys
    return num_splits(_num_programs(q_BNH, k_KPSH), page_table_BP.shape[1] * page_size, keys)


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
    shared: SharedKeys | None = None,
) -> None:
    """Launches attention_decode; see the contract. Lengths are read on the device alone.

    Of keys that are `shared` there are parts already; then there is no window.
    """
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    if batch == 0:
        return
    group = num_heads // num_kv_heads
    tile = decode_tile(group, head_dim, q_BNH.itemsize)
    num_programs = _num_programs(q_BNH, k_KPSH)
    num_parts = num_own_parts(q_BNH, k_KPSH, page_table_BP)
    if num_parts == 1:
        tile = replace(tile, num_warps=max(tile.num_warps, WHOLE_WARPS))
    parts = shared.parts if shared else Parts.empty(q_BNH, num_parts) if num_parts > 1 else None
    launch(_decode, (batch, num_programs // batch, num_parts), q_BNH)(
        q_BNH,
        k_KPSH,
        v_KPSH,
        page_table_BP,
        num_keys_B,
        shared.num_keys_B if shared else None,
        sinks_N,
        out_BNH,
        parts.part_BNJH if parts else None,
        parts.weight_BNJ if parts else None,
        counters_of(q_BNH.device) if parts else None,
        scale,
        window,
        soft_cap,
        num_parts,
        shared.num_parts if shared else 0,
        parts.num_slots if parts else 0,
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
        BLOCK_H=power_of_two(head_dim),
        BLOCK_G=min(MERGED_HEADS, 1 << (group - 1).bit_length()),
        BLOCK_J=MERGED_PARTS,
        HAS_WINDOW=window > 0,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks_N is not None,
        IN_PARTS=parts is not None,
        ONE_COMES=num_parts == 1,
        LEAST_TURNS=least_turns(num_programs),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
