"""The Triton programs of alignment. Importing it imports Triton.

One program for each expert counts its pairs; a second launch places them, in ascending order and without atomics, so
that the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.moe_align.reference import num_padded_rows

_CHUNK = 1024


@triton.jit
def _ids_at(
    ids_ptr: tl.tensor,
    pair: tl.tensor,
    num_pairs: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
) -> tl.tensor:
    """Experts of pairs, -1 past the last one."""
    place = (pair // TOP_K).to(tl.int64) * token_stride + pair % TOP_K * choice_stride
    return tl.load(ids_ptr + place, mask=pair < num_pairs, other=-1)


@triton.jit
def _count(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_pairs: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The pairs of this program's expert."""
    expert = tl.program_id(0)
    seen = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, num_pairs, CHUNK):
        ids = _ids_at(ids_ptr, first + tl.arange(0, CHUNK), num_pairs, token_stride, choice_stride, TOP_K)
        seen += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(seen, 0))


@triton.jit
def _place(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_rows_ptr: tl.tensor,
    num_pairs: tl.tensor,
    most_rows: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The rows of one expert, padding included; programs after the last expert's fill what is not used."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS_PADDED)
    counts = tl.load(counts_ptr + other, mask=other < NUM_EXPERTS, other=0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    total = tl.sum(padded, 0)
    chunk = tl.arange(0, CHUNK)
    if expert < NUM_EXPERTS:
        start = tl.sum(tl.where(other < expert, padded, 0), 0)
        end = start + tl.sum(tl.where(other == expert, padded, 0), 0)
        row = start
        for first in range(0, num_pairs, CHUNK):
            pair = first + chunk
            is_mine = _ids_at(ids_ptr, pair, num_pairs, token_stride, choice_stride, TOP_K) == expert
            before = tl.cumsum(is_mine.to(tl.int32), 0)
            tl.store(pairs_ptr + row + before - 1, pair, mask=is_mine)
            row += tl.sum(is_mine.to(tl.int32), 0)
        for first in range(row, end, CHUNK):
            tl.store(pairs_ptr + first + chunk, num_pairs, mask=first + chunk < end)
        for first in range(start // BLOCK, end // BLOCK, CHUNK):
            tl.store(block_experts_ptr + first + chunk, expert, mask=first + chunk < end // BLOCK)
    else:
        unused = (expert - NUM_EXPERTS) * CHUNK + chunk
        mask = (unused >= total) & (unused < most_rows)
        tl.store(pairs_ptr + unused, num_pairs, mask=mask)
        tl.store(block_experts_ptr + unused // BLOCK, -1, mask=mask & (unused % BLOCK == 0))
        if expert == NUM_EXPERTS:
            tl.store(num_rows_ptr, total)


def align(
    ids_TK: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the contract."""
    num_pairs, top_k = ids_TK.numel(), ids_TK.shape[1]
    most_rows = num_padded_rows(num_pairs, num_experts, block_size)
    counts_E, pairs_R, block_experts, num_rows = (
        torch.empty(size, dtype=torch.int32, device=ids_TK.device)
        for size in (num_experts, most_rows, most_rows // block_size, 1)
    )
    if num_pairs == 0:
        return pairs_R, block_experts, num_rows.zero_()
    chunk = min(_CHUNK, triton.next_power_of_2(num_pairs))
    _count[(num_experts,)](ids_TK, counts_E, num_pairs, *ids_TK.stride(), TOP_K=top_k, CHUNK=chunk)
    _place[(num_experts + triton.cdiv(most_rows, chunk),)](
        ids_TK,
        counts_E,
        pairs_R,
        block_experts,
        num_rows,
        num_pairs,
        most_rows,
        *ids_TK.stride(),
        TOP_K=top_k,
        NUM_EXPERTS=num_experts,
        EXPERTS_PADDED=triton.next_power_of_2(num_experts),
        BLOCK=block_size,
        CHUNK=chunk,
    )
    return pairs_R, block_experts, num_rows
