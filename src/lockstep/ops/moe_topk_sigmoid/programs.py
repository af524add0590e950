"""The Triton program of sigmoid routing. Importing it imports Triton.

As softmax routing does, it looks at the experts in fours, here the fours of each group, chooses by short keys and in
doubt by wide ones, and reads the experts of the eight best fours again. Fours of groups that do not compete are never
among them.
Shapes: T tokens, E experts, K experts of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_topk_sigmoid.reference import SMALLEST_SUM
from lockstep.ops.moe_topk_sigmoid.tiles import lanes_for
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
    no_key,
    row_offsets,
    rows_of_program,
    store_choices,
    taken_in_turn,
    together,
)
from lockstep.ops.moe_topk_softmax.tiles import chunk_of, id_mask, places_of, rows_of

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) as the square of a root: one instruction, where a division takes eight."""
    root = tl.math.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
    return root * root


@triton.jit
def _logits_and_bias(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    expert: tl.tensor,
    is_expert: tl.tensor,
    stride: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Flat; a bias of minus infinity where MASKED finds no expert."""
    logit_ptr = row_ptr[:, None] + expert * stride
    if MASKED:
        logits = tl.load(logit_ptr, mask=is_expert, other=0.0)
        if bias_ptr is None:
            bias = tl.where(is_expert, 0.0, float("-inf"))
        else:
            bias = tl.load(bias_ptr + expert, mask=is_expert, other=float("-inf"))
    else:
        logits = tl.load(logit_ptr)
        bias = tl.zeros(expert.shape, tl.float32) if bias_ptr is None else tl.load(bias_ptr + expert)
    return logits, bias


@triton.jit
def _choice(logits: tl.tensor, bias: tl.tensor) -> tl.tensor:
    """What experts are chosen by, float32."""
    return _sigmoid(logits.to(tl.float32)) + bias


@triton.jit
def _two_best(a: tl.tensor, a_next: tl.tensor, b: tl.tensor, b_next: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest and the second largest of two such pairs."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a_next, b_next))


@triton.jit
def _fours(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    stride: tl.tensor,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """What choices are the largest and, if there are groups, the second largest of every four.

    Two tuples of tensors [ROWS, LANES], RUN consecutive fours of each lane in turn. Every group takes PLACES columns.
    Everything is under way before anything is waited for.
    """
    GROUP: tl.constexpr = EXPERTS // GROUPS
    COLUMNS: tl.constexpr = GROUPS * PLACES
    IS_PADDED: tl.constexpr = GROUP != PLACES or COLUMNS % CHUNK != 0
    EACH: tl.constexpr = CHUNK // 4 // LANES
    read: tl.tuple = ()
    for first in tl.static_range(0, COLUMNS, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        place = column % PLACES
        expert = column // PLACES * GROUP + place if IS_PADDED else column
        is_expert = (place < GROUP) & (column < COLUMNS)
        read = read + (_logits_and_bias(row_ptr, bias_ptr, expert, is_expert, stride, IS_PADDED),)
    bests: tl.tuple = ()
    seconds: tl.tuple = ()
    for i in tl.static_range((COLUMNS + CHUNK - 1) // CHUNK):
        logits, bias = read[i]
        a, b, c, d = apart(_choice(logits, bias), ROWS, CHUNK // 4, 4)
        best, second = _two_best(tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d))
        if GROUPS == 1:
            bests = bests + taken_in_turn(best, ROWS, LANES, EACH, RUN)
        else:
            # Both at once, or a compiler may compute the choices once for each.
            both = tl.reshape(tl.permute(tl.join(best, second), (0, 2, 1)), (ROWS, CHUNK // 2))
            parts = taken_in_turn(both, ROWS, LANES, 2 * EACH, RUN)
            for j in tl.static_range(EACH):
                bests = bests + (parts[j],)
                seconds = seconds + (parts[EACH + j],)
    return bests, seconds


@triton.jit
def _sums_of_groups(
    bests: tl.tuple, seconds: tl.tuple, GROUP: tl.constexpr, GROUPS: tl.constexpr, FOURS: tl.constexpr
) -> tl.tuple:
    """[ROWS] for each group: the sum of its two best choices, its only one where GROUP is 1."""
    sums: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        best, second = bests[group * FOURS], seconds[group * FOURS]
        for i in tl.static_range(1, FOURS):
            best, second = _two_best(best, second, bests[group * FOURS + i], seconds[group * FOURS + i])
        row_best, row_second = tl.reduce((best, second), 1, _two_best)
        sum = row_best + row_second if GROUP > 1 else row_best
        # What is no number comes last, or not every place would be taken.
        sums = sums + (tl.maximum(sum, float("-inf")),)
    return sums


@triton.jit
def _are_competing(sums: tl.tuple, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr) -> tl.tuple:
    """Whether each group is among the best ones; of equal sums the group that comes first stays before."""
    competing: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        num_before = tl.zeros(sums[group].shape, tl.int32)
        for other in tl.static_range(GROUPS):
            if other < group:
                num_before += (sums[other] >= sums[group]).to(tl.int32)
            if other > group:
                num_before += (sums[other] > sums[group]).to(tl.int32)
        competing = competing + (num_before < TOP_GROUPS,)
    return competing


@triton.jit
def _best_experts(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    stride: tl.tensor,
    maxima: tl.tuple,
    competing: tl.tuple,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    ID_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """The keys of the eight best experts, dealt, and whether short keys may have chosen wrong ones, a scalar."""
    GROUP: tl.constexpr = EXPERTS // GROUPS
    FOURS: tl.constexpr = PLACES // 4 // LANES
    lane = tl.arange(0, LANES)[None, :]
    four_keys: tl.tuple = ()
    for i in tl.static_range(GROUPS * FOURS):
        # A four is known by its first expert: its key is not below that of any of its experts.
        place = 4 * (i % FOURS // RUN * RUN * LANES + lane * RUN + i % RUN)
        key = key_of(maxima[i], i // FOURS * GROUP + place, ID_MASK, WIDE)
        is_four = place < GROUP
        if GROUPS > 1:
            is_four = is_four & competing[i // FOURS][:, None]
        four_keys = four_keys + (tl.where(is_four, key, no_key(ROWS, LANES, WIDE)),)
    fours = dealt(best_eight(four_keys, GROUPS * FOURS), lane, LANES)

    IN_FOURS: tl.constexpr = GROUP % 4 == 0
    IS_PADDED: tl.constexpr = not IN_FOURS or TOP_GROUPS * GROUP < 32
    values: tl.tuple = ()
    flat_keys: tl.tuple = ()
    keys: tl.tuple = ()
    for i in tl.static_range(8 // LANES):
        # Where there were not enough fours, the winner lies past the experts.
        start = tl.minimum(id_of(fours[i], ID_MASK), (EXPERTS + 3) // 4 * 4)
        expert = from_first(start, ROWS, LANES, IN_FOURS)
        # The last four of a group may reach into the next one.
        group_end = tl.reshape(
            tl.broadcast_to((start // GROUP * GROUP + GROUP)[:, :, None], (ROWS, LANES, 4)), (ROWS, 4 * LANES)
        )
        is_expert = (expert < group_end) & (expert < EXPERTS)
        logits, bias = _logits_and_bias(row_ptr, bias_ptr, expert, is_expert, stride, IS_PADDED)
        choice = _choice(logits, bias)
        found = key_of(choice, expert, ID_MASK, WIDE)
        values = values + (choice,)
        flat_keys = flat_keys + (found,)
        keys = keys + apart(found, ROWS, LANES, 4)
    best = best_eight(keys, 32 // LANES)

    is_doubtful = tl.full((), False, tl.int1)
    if not WIDE:
        last = best[TOP_K - 1]
        is_doubtful = is_near(last, four_keys, GROUPS * FOURS, ID_MASK)
        is_doubtful |= is_near(last, flat_keys, 8 // LANES, ID_MASK) | is_crowded(best, TOP_K, ID_MASK)
        is_doubtful &= has_lost(maxima, GROUPS * FOURS, ID_MASK) | has_lost(values, 8 // LANES, ID_MASK)
    return dealt(best, lane, LANES), is_doubtful


@triton.jit
def _chosen(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    stride: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    ID_MASK: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tuple:
    """The eight best experts, dealt: by short keys, and by wide ones where those may be wrong."""
    RUN: tl.constexpr = min(PLACES, CHUNK) // 4 // LANES
    maxima, seconds = _fours(row_ptr, bias_ptr, stride, EXPERTS, GROUPS, PLACES, CHUNK, RUN, ROWS, LANES)
    competing: tl.tuple = ()
    if GROUPS > 1:
        sums = _sums_of_groups(maxima, seconds, EXPERTS // GROUPS, GROUPS, PLACES // 4 // LANES)
        competing = _are_competing(sums, GROUPS, TOP_GROUPS)
    best, is_doubtful = _best_experts(
        row_ptr,
        bias_ptr,
        stride,
        maxima,
        competing,
        EXPERTS,
        TOP_K,
        GROUPS,
        TOP_GROUPS,
        ID_MASK,
        False,
        PLACES,
        RUN,
        ROWS,
        LANES,
    )
    ids = ids_of(best, EXPERTS, ID_MASK, 8 // LANES)
    if is_doubtful:
        wide, _ = _best_experts(
            row_ptr,
            bias_ptr,
            stride,
            maxima,
            competing,
            EXPERTS,
            TOP_K,
            GROUPS,
            TOP_GROUPS,
            ID_MASK,
            True,
            PLACES,
            RUN,
            ROWS,
            LANES,
        )
        ids = ids_of(wide, EXPERTS, ID_MASK, 8 // LANES)
    return ids


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
    ID_MASK: tl.constexpr,
    DENSE: tl.constexpr,
    FULL: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """ROWS tokens. DENSE: rows follow each other. FULL: there are ROWS tokens at least."""
    EACH: tl.constexpr = 8 // LANES
    lane = tl.arange(0, LANES)[None, :]
    first, row = rows_of_program(num_tokens, FULL, ROWS)
    row_ptr = logits_ptr + row_offsets(first, row, token_stride, EXPERTS, DENSE)
    ids = _chosen(
        row_ptr,
        bias_ptr,
        expert_stride,
        EXPERTS,
        TOP_K,
        GROUPS,
        TOP_GROUPS,
        ID_MASK,
        PLACES,
        CHUNK,
        ROWS,
        LANES,
    )
    weights: tl.tuple = ()
    total = tl.zeros((ROWS, LANES), tl.float32)
    for i in tl.static_range(EACH):
        is_chosen = lane * EACH + i < TOP_K
        logit = tl.load(row_ptr[:, None] + ids[i] * expert_stride, mask=is_chosen, other=float("-inf"))
        weight = _sigmoid(logit.to(tl.float32))
        weights = weights + (weight,)
        total += weight

    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if RENORMALISE:
        factor = factor / (tl.sum(total, 1) + SMALLEST)
    share = together(weights, ROWS, LANES, EACH) * factor[:, None]
    store_choices(weights_ptr, share, first, num_tokens, TOP_K, FULL, ROWS)
    store_choices(ids_ptr, together(ids, ROWS, LANES, EACH), first, num_tokens, TOP_K, FULL, ROWS)


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
        lanes = lanes_for(num_tokens, num_experts)
        rows = rows_of(lanes)
        group = num_experts // num_groups
        places = places_of(group, lanes)
        has_enough_fours = top_k_groups * triton.cdiv(group, 4) >= 8
        _route[(triton.cdiv(num_tokens, rows),)](
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
            ID_MASK=id_mask(num_experts if has_enough_fours else num_experts + 1),
            DENSE=logits_TE.stride(0) == num_experts,
            FULL=num_tokens >= rows,
            PLACES=places,
            CHUNK=chunk_of(num_groups * places, lanes),
            ROWS=rows,
            LANES=lanes,
            num_warps=1,
        )
    return weights_TK, ids_TK
