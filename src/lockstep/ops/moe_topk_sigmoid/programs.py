"""The Triton program of sigmoid routing. Importing it imports Triton.

As softmax routing does, it looks at the experts in fours, here the fours of each group, and reads the experts of the
eight best fours again. The groups pass one by one, and the fours of the best ones so far are kept: a loop, because a
program that names every expert is longer than a processor's cache of instructions.
Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_topk_sigmoid.reference import SMALLEST_SUM
from lockstep.ops.moe_topk_sigmoid.tiles import tile_of
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
)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) as the square of a root: one instruction, where a division takes eight."""
    root = tl.math.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
    return root * root


@triton.jit
def _choice(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    expert: tl.tensor,
    is_expert: tl.tensor,
    stride: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """What the choice looks at, flat: score + bias; minus infinity where MASKED finds no expert."""
    logit_ptr = row_ptr[:, None] + expert * stride
    if MASKED:
        choice = _sigmoid(tl.load(logit_ptr, mask=is_expert, other=0.0).to(tl.float32))
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
        return tl.where(is_expert, choice, float("-inf"))
    else:
        choice = _sigmoid(tl.load(logit_ptr).to(tl.float32))
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert)
        return choice


@triton.jit
def _two_best(a: tl.tensor, a_next: tl.tensor, b: tl.tensor, b_next: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest and the second largest of two such pairs."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a_next, b_next))


@triton.jit
def _two_best_of_four(flat: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """[ROWS, LANES] each: the largest and the second largest of each lane's four."""
    a, b, c, d = elements(flat, ROWS, LANES)
    return _two_best(tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d))


@triton.jit
def _inserted(
    kept: tl.tuple, new: tl.tuple, is_before: tl.tuple, SLOTS: tl.constexpr, EACH: tl.constexpr
) -> tl.tuple:
    """`kept`, EACH tensors for each slot, with `new` in the first slot that it comes before; the last one falls off."""
    out: tl.tuple = ()
    for slot in tl.static_range(SLOTS):
        for i in tl.static_range(EACH):
            arriving = new[i]
            if slot > 0:
                arriving = tl.where(is_before[slot - 1], kept[(slot - 1) * EACH + i], arriving)
            out = out + (tl.where(is_before[slot], arriving, kept[slot * EACH + i]),)
    return out


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
    IN_FOURS: tl.constexpr = GROUP % 4 == 0
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows past the last one repeat it, and are not stored.
    row_ptr = logits_ptr + tl.minimum(token, num_tokens - 1) * token_stride
    lane = tl.arange(0, LANES)[None, :]
    column = tl.arange(0, 4 * LANES)[None, :]

    # The best groups so far: sums of their two best, first experts, and the maxima of their fours.
    sums: tl.tuple = ()
    firsts: tl.tuple = ()
    maxima: tl.tuple = ()
    for _ in tl.static_range(TOP_GROUPS):
        # Every group comes before no number.
        sums = sums + (tl.full((ROWS, LANES), float("nan"), tl.float32),)
        firsts = firsts + (tl.zeros((ROWS, LANES), tl.int32),)
        for _ in tl.static_range(FOURS):
            maxima = maxima + (tl.full((ROWS, LANES), float("-inf"), tl.float32),)
    for first in range(0, EXPERTS, GROUP):
        fours: tl.tuple = ()
        for i in tl.static_range(FOURS):
            place = i * 4 * LANES + column
            choice = _choice(
                row_ptr, bias_ptr, first + place, place < GROUP, expert_stride, GROUP % (4 * LANES) != 0
            )
            four_best, four_second = _two_best_of_four(choice, ROWS, LANES)
            fours = fours + (four_best,)
            if i == 0:
                best, second = four_best, four_second
            else:
                best, second = _two_best(best, second, four_best, four_second)
        row_best, row_second = tl.reduce((best, second), 1, _two_best)
        best = tl.broadcast_to(row_best[:, None], (ROWS, LANES))
        second = tl.broadcast_to(row_second[:, None], (ROWS, LANES))
        sum = best + second if GROUP > 1 else best
        # Of equal sums the group that came first stays before.
        is_before: tl.tuple = ()
        for slot in tl.static_range(TOP_GROUPS):
            is_before = is_before + (~(sums[slot] >= sum),)
        sums = _inserted(sums, (sum,), is_before, TOP_GROUPS, 1)
        firsts = _inserted(firsts, (tl.full((ROWS, LANES), 0, tl.int32) + first,), is_before, TOP_GROUPS, 1)
        maxima = _inserted(maxima, fours, is_before, TOP_GROUPS, FOURS)

    four_keys: tl.tuple = ()
    for slot in tl.static_range(TOP_GROUPS):
        for i in tl.static_range(FOURS):
            # A four is known by its first expert.
            place = (i * LANES + lane) * 4
            key = key_of(maxima[slot * FOURS + i], firsts[slot] + place, False)
            if GROUP % (4 * LANES) != 0:
                key = tl.where(place < GROUP, key, no_key(ROWS, LANES, False))
            four_keys = four_keys + (key,)
    for _ in tl.static_range(-TOP_GROUPS * FOURS % 8):
        four_keys = four_keys + (no_key(ROWS, LANES, False),)
    best_fours = merged_lanes(best_eight(four_keys, (TOP_GROUPS * FOURS + 7) // 8 * 8))
    best_fours = dealt(best_fours, lane, LANES)

    keys: tl.tuple = ()
    for i in tl.static_range(8 // LANES):
        start = tl.minimum(id_of(best_fours[i]), EXPERTS)
        expert = from_first(start, ROWS, LANES, IN_FOURS)
        # The last four of a group may reach into the next one, and where there was no four nothing is.
        group_end = tl.reshape(
            tl.broadcast_to((start // GROUP * GROUP + GROUP)[:, :, None], (ROWS, LANES, 4)), (ROWS, 4 * LANES)
        )
        is_expert = (expert < group_end) & (expert < EXPERTS)
        choice = _choice(
            row_ptr, bias_ptr, expert, is_expert, expert_stride, not IN_FOURS or TOP_GROUPS * GROUP < 32
        )
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
        is_chosen = lane * (8 // LANES) + i < TOP_K
        logit = tl.load(row_ptr[:, None] + id * expert_stride, mask=is_chosen, other=float("-inf"))
        weight = _sigmoid(logit.to(tl.float32))
        weights = weights + (weight,)
        ids = ids + (id,)
        total += weight

    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if RENORMALISE:
        factor = factor / (tl.sum(total, 1) + SMALLEST)
    choice = tl.arange(0, 8)[None, :]
    out = token[:, None] * TOP_K + choice
    mask = (token < num_tokens)[:, None] & (choice < TOP_K)
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
            num_warps=tile.num_warps,
        )
    return weights_TK, ids_TK
