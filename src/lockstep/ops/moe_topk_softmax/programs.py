"""The Triton program of softmax routing. Importing it imports Triton.

The experts of a row are looked at in fours. The eight best experts lie in the eight fours with the best maxima, so that
only one key for each four is sorted, and then the 32 experts of the winners, which are read again from the cache. Keys
are short. Where float32 logits lie so close that these cannot tell, a program chooses again by wide keys.
Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_topk_softmax.lists import (
    apart,
    best_eight,
    dealt,
    from_first,
    has_lost,
    id_of,
    ids_of,
    is_crowded,
    is_near,
    key_of,
    row_offsets,
    rows_of_program,
    store_choices,
    together,
    value_of,
)
from lockstep.ops.moe_topk_softmax.tiles import chunk_of, id_mask, lanes_for, num_warps_for, rows_of


@triton.jit
def _logits(
    row_ptr: tl.tensor, expert: tl.tensor, stride: tl.tensor, EXPERTS: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """float32 logits; minus infinity where MASKED finds no expert."""
    logit_ptr = row_ptr[:, None] + expert * stride
    if MASKED:
        return tl.load(logit_ptr, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(logit_ptr).to(tl.float32)


@triton.jit
def _maxima_of_fours(
    row_ptr: tl.tensor,
    stride: tl.tensor,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tuple:
    """Tensors [ROWS, LANES] of each chunk, consecutive fours of each lane. All is read before any is waited for."""
    column = tl.arange(0, CHUNK)[None, :]
    chunks: tl.tuple = ()
    for first in tl.static_range(0, EXPERTS, CHUNK):
        chunks = chunks + (_logits(row_ptr, first + column, stride, EXPERTS, first + CHUNK > EXPERTS),)
    maxima: tl.tuple = ()
    for i in tl.static_range((EXPERTS + CHUNK - 1) // CHUNK):
        a, b, c, d = apart(chunks[i], ROWS, CHUNK // 4, 4)
        four_best = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
        maxima = maxima + apart(four_best, ROWS, LANES, CHUNK // 4 // LANES)
    return maxima


@triton.jit
def _best_experts(
    row_ptr: tl.tensor,
    maxima: tl.tuple,
    stride: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ID_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """The keys of the eight best experts, dealt, and whether short keys may have chosen wrong ones, a scalar."""
    EACH: tl.constexpr = CHUNK // 4 // LANES
    FOURS: tl.constexpr = (EXPERTS + CHUNK - 1) // CHUNK * EACH
    IS_PADDED: tl.constexpr = EXPERTS % CHUNK != 0 or EXPERTS < 32
    lane = tl.arange(0, LANES)[None, :]
    four_keys: tl.tuple = ()
    for i in tl.static_range(FOURS):
        # A four is known by its first expert: its key is not below that of any of its experts.
        start = i // EACH * CHUNK + 4 * (lane * EACH + i % EACH)
        four_keys = four_keys + (key_of(maxima[i], start, ID_MASK, WIDE),)
    fours = dealt(best_eight(four_keys, FOURS), lane, LANES)

    values: tl.tuple = ()
    flat_keys: tl.tuple = ()
    keys: tl.tuple = ()
    for i in tl.static_range(8 // LANES):
        # Where there were not enough fours, and where logits are no numbers, the winner may lie past the experts.
        start = tl.minimum(id_of(fours[i], ID_MASK), (EXPERTS + 3) // 4 * 4)
        expert = from_first(start, ROWS, LANES, True)
        logits = _logits(row_ptr, expert, stride, EXPERTS, IS_PADDED)
        found = key_of(logits, expert, ID_MASK, WIDE)
        values = values + (logits,)
        flat_keys = flat_keys + (found,)
        keys = keys + apart(found, ROWS, LANES, 4)
    best = best_eight(keys, 32 // LANES)

    is_doubtful = tl.full((), False, tl.int1)
    if not WIDE:
        last = best[TOP_K - 1]
        is_doubtful = is_near(last, four_keys, FOURS, ID_MASK) | is_near(last, flat_keys, 8 // LANES, ID_MASK)
        is_doubtful |= is_crowded(best, TOP_K, ID_MASK)
        is_doubtful &= has_lost(maxima, FOURS, ID_MASK) | has_lost(values, 8 // LANES, ID_MASK)
    return dealt(best, lane, LANES), is_doubtful


@triton.jit
def _route(
    logits_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_tokens: tl.tensor,
    token_stride: tl.tensor,
    expert_stride: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    NARROW: tl.constexpr,
    ID_MASK: tl.constexpr,
    DENSE: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """ROWS tokens. NARROW: logits of 16 bits. DENSE: rows follow each other. FULL: there are ROWS tokens at least."""
    EACH: tl.constexpr = 8 // LANES
    lane = tl.arange(0, LANES)[None, :]
    first, row = rows_of_program(num_tokens, FULL, ROWS)
    row_ptr = logits_ptr + row_offsets(first, row, token_stride, EXPERTS, DENSE)
    maxima = _maxima_of_fours(row_ptr, expert_stride, EXPERTS, CHUNK, ROWS, LANES)
    best, is_doubtful = _best_experts(
        row_ptr, maxima, expert_stride, EXPERTS, TOP_K, ID_MASK, False, CHUNK, ROWS, LANES
    )
    ids = ids_of(best, EXPERTS, ID_MASK, EACH)
    logits: tl.tuple = ()
    if NARROW:
        for i in tl.static_range(EACH):
            logits = logits + (value_of(best[i], ID_MASK),)
    else:
        if is_doubtful:
            wide, _ = _best_experts(
                row_ptr, maxima, expert_stride, EXPERTS, TOP_K, ID_MASK, True, CHUNK, ROWS, LANES
            )
            ids = ids_of(wide, EXPERTS, ID_MASK, EACH)
        for i in tl.static_range(EACH):
            logits = logits + (tl.load(row_ptr[:, None] + ids[i] * expert_stride),)

    lane_largest = logits[0]
    for i in tl.static_range(1, EACH):
        lane_largest = tl.maximum(lane_largest, logits[i])
    largest = tl.max(lane_largest, 1)[:, None]
    weights: tl.tuple = ()
    lane_total = tl.zeros((ROWS, LANES), tl.float32)
    for i in tl.static_range(EACH):
        weight = tl.where(lane * EACH + i < TOP_K, tl.exp(logits[i] - largest), 0.0)
        weights = weights + (weight,)
        lane_total += weight
    total = tl.sum(lane_total, 1)
    if not RENORMALISE:
        total = tl.zeros((ROWS,), tl.float32)
        for start in tl.static_range(0, EXPERTS, CHUNK):
            expert = start + tl.arange(0, CHUNK)[None, :]
            every = _logits(row_ptr, expert, expert_stride, EXPERTS, start + CHUNK > EXPERTS)
            total += tl.sum(tl.exp(every - largest), 1)

    share = together(weights, ROWS, LANES, EACH) / total[:, None]
    store_choices(weights_ptr, share, first, num_tokens, TOP_K, FULL, ROWS)
    store_choices(ids_ptr, together(ids, ROWS, LANES, EACH), first, num_tokens, TOP_K, FULL, ROWS)


def route(logits_TE: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract; at most eight experts of each token."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens:
        lanes = lanes_for(num_tokens, num_experts)
        num_warps = num_warps_for(num_tokens, logits_TE.itemsize)
        rows, chunk = num_warps * rows_of(lanes), chunk_of(num_experts, lanes)
        _route[(triton.cdiv(num_tokens, rows),)](
            logits_TE,
            weights_TK,
            ids_TK,
            num_tokens,
            *logits_TE.stride(),
            EXPERTS=num_experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            NARROW=logits_TE.dtype != torch.float32,
            ID_MASK=id_mask(triton.cdiv(num_experts, chunk) * chunk),
            DENSE=logits_TE.stride(0) == num_experts,
            FULL=num_tokens >= rows,
            CHUNK=chunk,
            ROWS=rows,
            LANES=lanes,
            num_warps=num_warps,
        )
    return weights_TK, ids_TK
