"""The Triton programs of a mixture of experts. Importing it imports Triton.

Shapes: T tokens, D model, E experts, F inner width, K experts of each token, P = T * K pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.grouped_gemm.programs import grouped_product
from lockstep.ops.grouped_gemm.tiles import Problem, facts_of, tile_of
from lockstep.ops.moe_align.programs import align


@triton.jit
def _sum_choices(
    terms_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one token: the sum of its terms, but for those of other ranks, which nobody wrote."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * token_stride + choice * choice_stride)
        term_ptr = terms_ptr + (token * TOP_K + choice) * width
        mask = column < tl.where(expert >= 0, width, 0)
        total += tl.load(term_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def mix_experts(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """See the contract."""
    num_tokens, width = hidden_TD.shape
    num_experts, double_inner, _ = gate_up_E2FD.shape
    num_pairs, top_k = ids_TK.numel(), ids_TK.shape[1]
    out_TD = hidden_TD.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out_TD
    device, itemsize = facts_of(hidden_TD.device), hidden_TD.itemsize
    up_tile = tile_of(Problem(num_pairs, num_experts, width, double_inner, itemsize), device)
    down_tile = tile_of(Problem(num_pairs, num_experts, double_inner // 2, width, itemsize), device)
    aligned = align(ids_TK, num_experts, up_tile.rows)
    inner_PF = hidden_TD.new_empty(num_pairs, double_inner // 2)
    grouped_product(hidden_TD, gate_up_E2FD, inner_PF, aligned, None, top_k, up_tile, gated=True)
    terms_PD = hidden_TD.new_empty(num_pairs, width)
    # Both products walk the same blocks.
    down_tile = down_tile._replace(rows=up_tile.rows)
    grouped_product(inner_PF, down_EDF, terms_PD, aligned, weights_TK.contiguous(), 1, down_tile)
    block = min(1024, triton.next_power_of_2(width))
    _sum_choices[(num_tokens, triton.cdiv(width, block))](
        terms_PD, ids_TK, out_TD, width, *ids_TK.stride(), TOP_K=top_k, BLOCK=block
    )
    return out_TD
