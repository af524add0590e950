"""The Triton program of softmax routing. Importing it imports Triton.

The experts of a row are looked at in fours. The eight best experts lie in the eight fours with the best maxima, so that
only one key for each four is sorted, and then the 32 experts of the winners, which are read again from the cache.
Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_topk_softmax.lists import (
    best_eight,
    dealt,
    elements,
    from_first,
    gathered,
    id_of,
    key_of,
    merged_lanes,
    no_key,
    value_of,
)
from lockstep.ops.moe_topk_softmax.tiles import tile_of


@triton.jit
def _logits(row_ptr: tl.tensor, expert: tl.tensor, stride: tl.tensor, EXPERTS: tl.constexpr) -> tl.tensor:
    """Flat logits, minus infinity where there are no experts."""
    return tl.load(row_ptr[:, None] + expert * stride, mask=expert < EXPERTS, other=float("-inf"))


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
    FOURS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """ROWS tokens. FOURS is how many fours each lane looks at, rounded up to whole lists."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows past the last one repeat it, and are not stored.
    row_ptr = logits_ptr + tl.minimum(token, num_tokens - 1) * token_stride
    lane = tl.arange(0, LANES)[None, :]
    column = tl.arange(0, 4 * LANES)[None, :]

    four_keys: tl.tuple = ()
    for i in tl.static_range(FOURS):
        if i * LANES * 4 < EXPERTS:
            logits = _logits(row_ptr, i * 4 * LANES + column, expert_stride, EXPERTS)
            a, b, c, d = elements(logits.to(tl.float32), ROWS, LANES)
            four_best = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
            four_keys = four_keys + (key_of(four_best, i * LANES + lane, NARROW),)
        else:
            four_keys = four_keys + (no_key(ROWS, LANES, NARROW),)
    fours = dealt(merged_lanes(best_eight(four_keys, FOURS)), lane, LANES)

    keys: tl.tuple = ()
    for i in tl.static_range(8 // LANES):
        # Where a lane had no four to offer, the first one past the experts: all of it is masked.
        four = tl.minimum(id_of(fours[i]), (EXPERTS + 3) // 4)
        expert = from_first(four * 4, ROWS, LANES, True)
        logits = _logits(row_ptr, expert, expert_stride, EXPERTS)
        keys = keys + elements(key_of(logits, expert, NARROW), ROWS, LANES)
    for _ in tl.static_range(32 // LANES, 8):
        keys = keys + (no_key(ROWS, LANES, NARROW),)
    best = merged_lanes(best_eight(keys, max(8, 32 // LANES)))

    largest = value_of(best[0], NARROW)
    chosen = dealt(best, lane, LANES)
    weights: tl.tuple = ()
    ids: tl.tuple = ()
    total = tl.zeros((ROWS, LANES), tl.float32)
    for i in tl.static_range(8 // LANES):
        is_chosen = lane * (8 // LANES) + i < TOP_K
        weight = tl.where(is_chosen, tl.exp(value_of(chosen[i], NARROW) - largest[:, None]), 0.0)
        weights = weights + (weight,)
        # Logits that are no numbers may let padding win; an id must name an expert all the same.
        ids = ids + (tl.minimum(id_of(chosen[i]), EXPERTS - 1),)
        if RENORMALISE:
            total += weight
    if not RENORMALISE:
        for i in tl.static_range((EXPERTS + 4 * LANES - 1) // (4 * LANES)):
            logits = _logits(row_ptr, i * 4 * LANES + column, expert_stride, EXPERTS)
            a, b, c, d = elements(tl.exp(logits.to(tl.float32) - largest[:, None]), ROWS, LANES)
            total += (a + b) + (c + d)

    choice = tl.arange(0, 8)[None, :]
    out = token[:, None] * TOP_K + choice
    mask = (token < num_tokens)[:, None] & (choice < TOP_K)
    share = gathered(weights, ROWS, LANES) / tl.sum(total, 1)[:, None]
    tl.store(weights_ptr + out, share, mask=mask)
    tl.store(ids_ptr + out, gathered(ids, ROWS, LANES), mask=mask)


def route(logits_TE: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract; at most eight experts of each token."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens:
        tile = tile_of(num_tokens)
        _route[(triton.cdiv(num_tokens, tile.rows),)](
            logits_TE,
            weights_TK,
            ids_TK,
            num_tokens,
            *logits_TE.stride(),
            EXPERTS=num_experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            NARROW=logits_TE.dtype != torch.float32,
            FOURS=triton.cdiv(num_experts, 32 * tile.lanes) * 8,
            ROWS=tile.rows,
            LANES=tile.lanes,
            num_warps=tile.num_warps,
        )
    return weights_TK, ids_TK
