"""The Triton program of attention_decode_shared: parts of what attention_decode then ends. Imports Triton.

M pairs of a tile's sequence and a query head, L keys, R sequences of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.attention_decode.programs import Parts, SharedKeys, decode, num_own_parts, part_size
from lockstep.ops.attention_decode_shared.tiles import ROWS, shared_splits, shared_tile
from lockstep.ops.attention_extend.programs import pages_of, see_keys
from lockstep.ops.attention_extend.tiles import power_of_two
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs


# Numbers that change from step to step: no program of their own for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_parts", "num_slots", "table_stride"])
def _decode_shared(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    shared_keys_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    part_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    num_parts: tl.tensor,
    num_slots: tl.tensor,
    q_strides: tl.tensor,
    table_stride: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Some query heads of one KV head, of all sequences of a tile, over one part of the keys that these share.

    Leaves for each pair its result, normalised, and log2 of its weight, in the first of a sequence's `num_slots`.
    """
    HEADS: tl.constexpr = BLOCK_M // ROWS
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # Tables are a step's, and known before its first layer.
    tiles_ptr += tl.program_id(0) * ROWS
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    part = tl.program_id(2)
    # All sequences of a tile have the same pages there: the one with the highest number is as good as any.
    lead = tl.max(tl.load(tiles_ptr + tl.arange(0, ROWS)), axis=0)
    num_keys = tl.load(shared_keys_ptr + lead, mask=lead >= 0, other=0)
    size = part_size(num_keys, num_parts, BLOCK_L, 1)
    keys_from = part * size
    m = tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    row_M = tl.load(tiles_ptr + m // HEADS).to(tl.int64)
    wait_for_inputs(PDL)
    if keys_from >= num_keys:
        return
    keys_end = tl.minimum(keys_from + size, num_keys)

    at_M = tl.program_id(1) % HEAD_BLOCKS * HEADS + m % HEADS
    head_M = kv_head * GROUP + at_M
    is_pair_M = (row_M >= 0) & (at_M < GROUP)
    mask_MH = is_pair_M[:, None] & (h < HEAD_DIM)[None, :]
    q_MH = q_ptr + (row_M * q_strides[0] + head_M * q_strides[1])[:, None] + h[None, :]
    q_MH = tl.load(q_MH, mask=mask_MH, other=0.0)
    acc_MH = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    position_M = tl.zeros([BLOCK_M], tl.int32) + (keys_end - 1)
    k_ptr += kv_head.to(tl.int64) * k_strides[0]
    v_ptr += kv_head.to(tl.int64) * v_strides[0]
    table_ptr += lead.to(tl.int64) * table_stride
    whole_end = keys_from + (keys_end - keys_from) // BLOCK_L * BLOCK_L
    # First whole turns, of which every key is seen, then what is left.
    for MASKED in tl.static_range(2):
        for first_key in range(whole_end if MASKED else keys_from, keys_end if MASKED else whole_end, BLOCK_L):
            acc_MH, top_M, total_M = see_keys(
                acc_MH,
                top_M,
                total_M,
                q_MH,
                k_ptr,
                v_ptr,
                pages_of(first_key, keys_end, table_ptr, PAGE_SIZE, BLOCK_L, MASKED),
                first_key,
                position_M,
                keys_end,
                scale,
                0,
                soft_cap,
                k_strides,
                v_strides,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_H,
                BLOCK_L,
                MASKED,
                False,
                HAS_SOFT_CAP,
            )
    place_M = (row_M * NUM_HEADS + head_M) * num_slots + part
    tl.store(part_ptr + (place_M * HEAD_DIM)[:, None] + h[None, :], acc_MH / total_M[:, None], mask=mask_MH)
    tl.store(weight_ptr + place_M, top_M + tl.log2(total_M), mask=is_pair_M)


def decode_shared(
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
    """Launches attention_decode_shared; see the contract. Lengths are read on the device alone."""
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    if batch == 0:
        return
    group = num_heads // num_kv_heads
    tile = shared_tile(group, head_dim, q_BNH.itemsize)
    num_head_programs = num_kv_heads * -(-group // (tile.rows // ROWS))
    most_keys = page_table_BP.shape[1] * page_size
    num_parts = shared_splits(batch, num_head_programs, most_keys, tile.keys)
    parts = Parts.empty(q_BNH, num_parts + num_own_parts(q_BNH, k_KPSH, page_table_BP))
    _decode_shared[(tiles_TR.shape[0], num_head_programs, num_parts)](
        q_BNH,
        k_KPSH,
        v_KPSH,
        page_table_BP,
        shared_keys_B,
        tiles_TR,
        parts.part_BNJH,
        parts.weight_BNJ,
        scale,
        soft_cap,
        num_parts,
        parts.num_slots,
        q_BNH.stride()[:2],
        page_table_BP.stride(0),
        k_KPSH.stride()[:3],
        v_KPSH.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        ROWS=ROWS,
        BLOCK_M=tile.rows,
        BLOCK_L=tile.keys,
        BLOCK_H=power_of_two(head_dim),
        HAS_SOFT_CAP=soft_cap > 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
    where = (page_table_BP, num_keys_B)
    shared = SharedKeys(shared_keys_B, num_parts, parts)
    decode(q_BNH, k_KPSH, v_KPSH, *where, sinks_N, out_BNH, scale, 0, soft_cap, shared)
