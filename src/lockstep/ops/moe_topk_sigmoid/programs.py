"""The Triton program of sigmoid routing. Importing it imports Triton.

As softmax routing does, it looks at the experts in fours, here the fours of each group, and reads the experts of the
eight best fours again. Fours of groups that do not compete are never among them.
Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_topk_sigmoid.reference import SMALLEST_SUM
from lockstep.ops.moe_topk_softmax.lists import (
    best_eight,
    dealt,
    elements,
    gathered,
    id_of,
    key_of,
    merged_lanes,
    no_key,
)
from lockstep.ops.moe_topk_softmax.tiles import NUM_WARPS, tile_of


@triton.jit
def _two_best(a: tl.tensor, a_next: tl.tensor, b: tl.tensor, b_next: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest and the second largest of two such pairs."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a_next, b_next))


@triton.jit
def _ranks(sums: tl.tuple, GROUPS: tl.constexpr) -> tl.tuple:
    """How many groups come before each one; of equal sums the lowest group comes first."""
    ranks: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        rank = tl.zeros(sums[group].shape, tl.int32)
        for other in tl.static_range(GROUPS):
            if other < group:
                rank += (sums[other] >= sums[group]).to(tl.int32)
            if other > group:
                rank += (sums[other] > sums[group]).to(tl.int32)
        ranks = ranks + (rank,)
    return ranks


@triton.jit
def _choice(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    is_row: tl.tensor,
    expert: tl.tensor,
    is_expert: tl.tensor,
    stride: tl.tensor,
) -> tl.tensor:
    """What the choice looks at, [ROWS, LANES, 4]: score + bias, minus infinity where there is no expert."""
    mask = is_row[:, None, None] & is_expert
    score = tl.sigmoid(tl.load(row_ptr[:, None, None] + expert * stride, mask=mask, other=0.0).to(tl.float32))
    if bias_ptr is not None:
        score += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    return tl.where(is_expert, score, float("-inf"))


@triton.jit
def _route(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_tokens: tl.tensor,
    token_stride: tl.tensor,
    expert_stride: tl.tensor,
    scale: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SMALLEST: tl.constexpr,
    FOURS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """ROWS tokens. FOURS is how many fours of each group each lane looks at."""
    GROUP: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    row_ptr = logits_ptr + token * token_stride
    lane = tl.arange(0, LANES)[None, :]
    within = tl.arange(0, 4)

    maxima: tl.tuple = ()
    sums: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        best = tl.full((ROWS, LANES), float("-inf"), tl.float32)
        second = best
        for i in tl.static_range(FOURS):
            place = (i * LANES + lane)[:, :, None] * 4 + within
            choice = _choice(row_ptr, bias_ptr, is_token, group * GROUP + place, place < GROUP, expert_stride)
            four_best, four_second = tl.reduce(
                (choice, tl.full(choice.shape, float("-inf"), tl.float32)), 2, _two_best
            )
            maxima = maxima + (four_best,)
            best, second = _two_best(best, second, four_best, four_second)
        best, second = tl.reduce((best, second), 1, _two_best)
        sums = sums + (best + second if GROUP > 1 else best,)

    ranks = _ranks(sums, GROUPS)
    four_keys: tl.tuple = ()
    for slot in tl.static_range(TOP_GROUPS):
        # The group of this rank: its number, and then its fours.
        group = tl.zeros((ROWS,), tl.int32)
        for other in tl.static_range(1, GROUPS):
            group = tl.where(ranks[other] == slot, other, group)
        for i in tl.static_range(FOURS):
            best = maxima[i]
            for other in tl.static_range(1, GROUPS):
                best = tl.where((ranks[other] == slot)[:, None], maxima[other * FOURS + i], best)
            # A four is known by its first expert.
            place = (i * LANES + lane) * 4
            key = key_of(best, group[:, None] * GROUP + place, False)
            four_keys = four_keys + (tl.where(place < GROUP, key, no_key(ROWS, LANES, False)),)
    for _ in tl.static_range(-TOP_GROUPS * FOURS % 8):
        four_keys = four_keys + (no_key(ROWS, LANES, False),)
    fours = dealt(merged_lanes(best_eight(four_keys, (TOP_GROUPS * FOURS + 7) // 8 * 8)), lane, LANES)

    keys: tl.tuple = ()
    for i in tl.static_range(8 // LANES):
        first = tl.minimum(id_of(fours[i]), EXPERTS)[:, :, None]
        expert = first + within
        # The last four of a group may reach into the next one, and where there was no four nothing is.
        is_expert = (expert // GROUP == first // GROUP) & (expert < EXPERTS)
        choice = _choice(row_ptr, bias_ptr, is_token, expert, is_expert, expert_stride)
        keys = keys + elements(key_of(choice, expert, False), ROWS, LANES)
    for _ in tl.static_range(32 // LANES, 8):
        keys = keys + (no_key(ROWS, LANES, False),)
    chosen = dealt(merged_lanes(best_eight(keys, max(8, 32 // LANES))), lane, LANES)

    weights: tl.tuple = ()
    ids: tl.tuple = ()
    total = tl.zeros((ROWS, LANES), tl.float32)
    for i in tl.static_range(8 // LANES):
        # Logits that are no numbers may let padding win; an id must name an expert all the same.
        id = tl.minimum(id_of(chosen[i]), EXPERTS - 1)
        mask = is_token[:, None] & (lane * (8 // LANES) + i < TOP_K)
        logit = tl.load(row_ptr[:, None] + id * expert_stride, mask=mask, other=float("-inf"))
        weight = tl.sigmoid(logit.to(tl.float32))
        weights = weights + (weight,)
        ids = ids + (id,)
        total += weight

    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if RENORMALISE:
        factor = factor / (tl.sum(total, 1) + SMALLEST)
    choice = tl.arange(0, 8)[None, :]
    out = token[:, None] * TOP_K + choice
    mask = is_token[:, None] & (choice < TOP_K)
    tl.store(weights_ptr + out, gathered(weights, ROWS, LANES) * factor[:, None], mask=mask)
    tl.store(ids_ptr + out, gathered(ids, ROWS, LANES), mask=mask)


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    renormalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract; at most eight experts of each token."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens:
        tile = tile_of(num_tokens)
        _route[(triton.cdiv(num_tokens, tile.rows),)](
            logits_TE,
            bias_E,
            weights_TK,
            ids_TK,
            num_tokens,
            *logits_TE.stride(),
            scale,
            EXPERTS=num_experts,
            TOP_K=top_k,
            GROUPS=num_groups,
            TOP_GROUPS=top_k_groups,
            RENORMALISE=renormalise,
            SMALLEST=SMALLEST_SUM,
            FOURS=triton.cdiv(num_experts // num_groups, 4 * tile.lanes),
            ROWS=tile.rows,
            LANES=tile.lanes,
            num_warps=NUM_WARPS,
        )
    return weights_TK, ids_TK
