"""The Triton program of attention_extend, and the step of a running softmax that decoding shares. Imports Triton.

Tiles hold M rows (pairs of a new token and a query head) and L keys. Scores are in units of log2, for exp2.
Source of the running softmax: Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lockstep.ops.attention_extend.tiles import extend_tile, power_of_two

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pages_of(
    first_key: tl.tensor,
    num_keys: tl.tensor,
    table_ptr: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """The page of each key from `first_key` on; with MASKED, page 0 for those that the sequence has not."""
    key_L = first_key + tl.arange(0, BLOCK_L)
    if MASKED:
        page_L = tl.load(table_ptr + key_L // PAGE_SIZE, mask=key_L < num_keys, other=0)
    else:
        page_L = tl.load(table_ptr + key_L // PAGE_SIZE)
    return page_L.to(tl.int64)


@triton.jit
def see_keys(
    acc_MH: tl.tensor,
    top_M: tl.tensor,
    total_M: tl.tensor,
    q_MH: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    page_L: tl.tensor,
    first_key: tl.tensor,
    position_M: tl.tensor,
    num_keys: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    soft_cap: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
) -> Any:
    """(acc, top, total) of a running softmax after keys first_key .. first_key + BLOCK_L of one KV head.

    `page_L` are these keys' pages. acc: weighted sum of values; top: largest score; total: sum of weights. Unless
    MASKED, every row sees every key.
    """
    key_L = first_key + tl.arange(0, BLOCK_L)
    h = tl.arange(0, BLOCK_H)
    slot_L = key_L % PAGE_SIZE
    k_HL = k_ptr + (page_L * k_strides[1] + slot_L * k_strides[2])[None, :] + h[:, None]
    v_LH = v_ptr + (page_L * v_strides[1] + slot_L * v_strides[2])[:, None] + h[None, :]
    if MASKED:
        k_HL = tl.load(k_HL, mask=(key_L < num_keys)[None, :] & (h < HEAD_DIM)[:, None], other=0.0)
        v_LH = tl.load(v_LH, mask=(key_L < num_keys)[:, None] & (h < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_H:
        k_HL = tl.load(k_HL, mask=(h < HEAD_DIM)[:, None], other=0.0)
        v_LH = tl.load(v_LH, mask=(h < HEAD_DIM)[None, :], other=0.0)
    else:
        k_HL = tl.load(k_HL)
        v_LH = tl.load(v_LH)

    scores_ML = tl.dot(q_MH, k_HL, input_precision="ieee")
    if HAS_SOFT_CAP:
        # cap * tanh(score / cap), from an exponential that cannot overflow.
        share_ML = scores_ML * (scale / soft_cap)
        shrunk_ML = tl.exp2(tl.abs(share_ML) * (-2 * LOG2_E))
        tanh_ML = (1.0 - shrunk_ML) / (1.0 + shrunk_ML)
        scores_ML = tl.where(share_ML < 0, -tanh_ML, tanh_ML)
        unit = soft_cap * LOG2_E
    else:
        unit = scale * LOG2_E
    if MASKED:
        seen_ML = key_L[None, :] <= position_M[:, None]
        if HAS_WINDOW:
            seen_ML = seen_ML & (key_L[None, :] > (position_M - window)[:, None])
        scores_ML = tl.where(seen_ML, scores_ML, float("-inf"))
    # Scores stay in units of their own: one multiplication and addition brings each into the exponent.
    new_top_M = tl.maximum(top_M, tl.max(scores_ML, axis=1) * unit)
    # A row that has seen no key yet has no largest score to subtract.
    base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M) if MASKED else new_top_M
    weights_ML = tl.exp2(scores_ML * unit - base_M[:, None])
    shrink_M = tl.exp2(top_M - base_M)
    total_M = total_M * shrink_M + tl.sum(weights_ML, axis=1)
    acc_MH = tl.dot(weights_ML.to(v_LH.dtype), v_LH, acc_MH * shrink_M[:, None], input_precision="ieee")
    return acc_MH, new_top_M, total_M


@triton.jit
def _sequence_of(
    tile: tl.tensor,
    cu_rows_ptr: tl.tensor,
    num_sequences: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> Any:
    """The sequence that owns a tile: b has those from cu_rows[b] // TOKENS + b on; padding is one more sequence."""
    found = 0
    for at in range(0, num_sequences + 1, BLOCK_B):
        b = at + tl.arange(0, BLOCK_B)
        first_row = tl.load(cu_rows_ptr + b, mask=b <= num_sequences, other=0)
        found += tl.sum(((b <= num_sequences) & (first_row // TOKENS + b <= tile)).to(tl.int32), axis=0)
    return found - 1


# Numbers that change from step to step: no program of their own for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["window", "num_rows", "num_sequences", "table_stride"])
def _extend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cu_rows_ptr: tl.tensor,
    num_keys_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    soft_cap: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    q_strides: tl.tensor,
    out_strides: tl.tensor,
    table_stride: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """BLOCK_M // GROUP tokens of one sequence with the GROUP query heads of one KV head."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    # Late tiles see most keys: started first, they leave the short ones to fill the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    b = _sequence_of(tile, cu_rows_ptr, num_sequences, TOKENS, 128)
    is_sequence = b < num_sequences
    sequence_row = tl.load(cu_rows_ptr + b)
    first_row = sequence_row + (tile - sequence_row // TOKENS - b) * TOKENS
    end_row = tl.load(cu_rows_ptr + b + 1, mask=is_sequence, other=num_rows)
    if first_row >= end_row:
        return
    num_keys = tl.load(num_keys_ptr + b, mask=is_sequence, other=0)

    m = tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    row_M = first_row + m // GROUP
    head_M = kv_head * GROUP + m % GROUP
    is_row_M = (m < TOKENS * GROUP) & (row_M < end_row)
    mask_MH = is_row_M[:, None] & (h < HEAD_DIM)[None, :]
    q_MH = q_ptr + (row_M.to(tl.int64) * q_strides[0] + head_M * q_strides[1])[:, None] + h[None, :]
    q_MH = tl.load(q_MH, mask=mask_MH, other=0.0)

    acc_MH = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if HAS_SINKS:
        top_M = tl.load(sinks_ptr + head_M, mask=is_row_M, other=0.0).to(tl.float32) * LOG2_E
        total_M = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total_M = tl.zeros([BLOCK_M], tl.float32)
    # The newest row stands at position num_keys - 1. A sequence without keys has no position from 0 on.
    position_M = num_keys - end_row + row_M
    first_position = num_keys - end_row + first_row
    keys_end = tl.where(num_keys > 0, tl.minimum(num_keys, first_position + TOKENS), 0)
    if HAS_WINDOW:
        masked_from = tl.maximum(0, first_position - window + 1) // BLOCK_L * BLOCK_L
    else:
        masked_from = tl.where(num_keys > 0, (first_position + 1) // BLOCK_L * BLOCK_L, 0)
    k_ptr += kv_head.to(tl.int64) * k_strides[0]
    v_ptr += kv_head.to(tl.int64) * v_strides[0]
    table_ptr += b.to(tl.int64) * table_stride
    # First the keys that every row sees, then those that some do not; a window may hide keys of either kind.
    for MASKED in tl.static_range(1 if HAS_WINDOW else 0, 2):
        keys_from = masked_from if MASKED else 0
        keys_until = keys_end if MASKED else masked_from
        for first_key in range(keys_from, keys_until, BLOCK_L):
            acc_MH, top_M, total_M = see_keys(
                acc_MH,
                top_M,
                total_M,
                q_MH,
                k_ptr,
                v_ptr,
                pages_of(first_key, num_keys, table_ptr, PAGE_SIZE, BLOCK_L, MASKED),
                first_key,
                position_M,
                num_keys,
                scale,
                window,
                soft_cap,
                k_strides,
                v_strides,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_H,
                BLOCK_L,
                MASKED,
                HAS_WINDOW,
                HAS_SOFT_CAP,
            )
    out_MH = acc_MH / tl.where(total_M > 0, total_M, 1.0)[:, None]
    out_ptr += (row_M.to(tl.int64) * out_strides[0] + head_M * out_strides[1])[:, None] + h[None, :]
    tl.store(out_ptr, out_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)


def extend(
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
    """Launches attention_extend; see the contract. Lengths are read on the device alone."""
    num_rows, num_heads, head_dim = q_TNH.shape
    num_kv_heads, _, page_size, _ = k_KPSH.shape
    num_sequences = num_keys_B.shape[0]
    if num_rows == 0:
        return
    group = num_heads // num_kv_heads
    tile = extend_tile(group, head_dim, q_TNH.itemsize, num_rows, num_kv_heads)
    num_tiles = num_rows // (tile.rows // group) + num_sequences + 1
    _extend[(num_tiles, num_kv_heads)](
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
        num_rows,
        num_sequences,
        q_TNH.stride()[:2],
        out_TNH.stride()[:2],
        page_table_BP.stride(0),
        k_KPSH.stride()[:3],
        v_KPSH.stride()[:3],
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_M=tile.rows,
        BLOCK_L=tile.keys,
        BLOCK_H=power_of_two(head_dim),
        HAS_WINDOW=window > 0,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks_N is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
