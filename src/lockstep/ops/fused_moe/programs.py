"""The Triton programs of a mixture of experts. Importing it imports Triton.

Shapes: T tokens, D model, E experts, F inner width, K experts of each token, P = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.fused_moe.plans import Plan, Problem, plan_of
from lockstep.ops.grouped_gemm.programs import grouped_product, product_by_tokens
from lockstep.ops.grouped_gemm.tiles import Tile, facts_of
from lockstep.ops.moe_align.programs import align

DownOfPairs: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Tile], torch.Tensor]
"""The second product of the way "pairs", as `down_of_pairs` is: submitted right behind the first one."""


@triton.jit
def _loaded(ptrs: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """float32 values; with MASKED zeros where the mask says no."""
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(ptrs).to(tl.float32)


@triton.jit
def _gate_and_up(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    inner: tl.tensor,
    hidden_stride: tl.tensor,
    hidden_column_stride: tl.tensor,
    expert_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_OUTPUTS of silu(gate x) * (up x) of one pair. STAGES 0: all steps unrolled."""
    wait_for_inputs(PDL)
    # Pairs of the same expert run side by side, so that the second finds the weights in the cache.
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64)
    expert = tl.load(ids_ptr + token * token_stride + pair % TOP_K * choice_stride).to(tl.int64)
    if expert < 0:
        return
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    input = tl.arange(0, TILE_INPUTS)
    row = tl.minimum(output, inner - 1).to(tl.int64)
    x_ptrs = hidden_ptr + token * hidden_stride + input * hidden_column_stride
    gate_ptrs = weight_ptr + expert * expert_stride + row[:, None] * row_stride + input[None, :] * column_stride
    up_ptrs = gate_ptrs + tl.cast(inner, tl.int64) * row_stride
    gates = tl.zeros((TILE_OUTPUTS, TILE_INPUTS), tl.float32)
    ups = tl.zeros((TILE_OUTPUTS, TILE_INPUTS), tl.float32)
    MASKED: tl.constexpr = INPUTS % TILE_INPUTS != 0
    if STAGES == 0:
        for first in tl.static_range(0, INPUTS, TILE_INPUTS):
            mask = input < INPUTS - first
            x = _loaded(x_ptrs + first * hidden_column_stride, mask, MASKED)[None, :]
            gates += _loaded(gate_ptrs + first * column_stride, mask[None, :], MASKED) * x
            ups += _loaded(up_ptrs + first * column_stride, mask[None, :], MASKED) * x
    else:
        for first in tl.range(0, INPUTS, TILE_INPUTS, num_stages=STAGES):
            mask = input < INPUTS - first
            x = _loaded(x_ptrs + first * hidden_column_stride, mask, MASKED)[None, :]
            gates += _loaded(gate_ptrs + first * column_stride, mask[None, :], MASKED) * x
            ups += _loaded(up_ptrs + first * column_stride, mask[None, :], MASKED) * x
    gate = tl.sum(gates, 1)
    value = gate * tl.sigmoid(gate) * tl.sum(ups, 1)
    inner_ptrs = inner_ptr + pair.to(tl.int64) * inner + output
    tl.store(inner_ptrs, value.to(inner_ptr.dtype.element_ty), mask=output < inner)


@triton.jit
def _weighted_down(
    inner_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    expert_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_OUTPUTS columns of one token: its experts' outputs, weighted and added in the order of the choices."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    input = tl.arange(0, TILE_INPUTS)
    row = tl.minimum(output, width - 1).to(tl.int64)
    first_ptrs = weight_ptr + row[:, None] * row_stride + input[None, :] * column_stride
    total = tl.zeros((TILE_OUTPUTS, TILE_INPUTS), tl.float32)
    # Choices are unrolled in any case, so that the reads of one do not wait for the sums of another.
    for choice in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * token_stride + choice * choice_stride).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + choice)
        x_ptrs = inner_ptr + (token * TOP_K + choice) * INPUTS + input
        w_ptrs = first_ptrs + expert * expert_stride
        if STAGES == 0:
            for first in tl.static_range(0, INPUTS, TILE_INPUTS):
                total += _weighted(x_ptrs, w_ptrs, first, column_stride, expert, weight, INPUTS, TILE_INPUTS)
        else:
            for first in tl.range(0, INPUTS, TILE_INPUTS, num_stages=STAGES):
                total += _weighted(x_ptrs, w_ptrs, first, column_stride, expert, weight, INPUTS, TILE_INPUTS)
    out = tl.sum(total, 1)
    tl.store(out_ptr + token * width + output, out.to(out_ptr.dtype.element_ty), mask=output < width)


@triton.jit
def _weighted(
    x_ptrs: tl.tensor,
    w_ptrs: tl.tensor,
    first: tl.tensor,
    column_stride: tl.tensor,
    expert: tl.tensor,
    weight: tl.tensor,
    INPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
) -> tl.tensor:
    """The products of one step. Nothing is read of an expert of another rank."""
    mask = tl.full((TILE_INPUTS,), True, tl.int1) & (expert >= 0)
    if INPUTS % TILE_INPUTS != 0:
        mask = mask & (tl.arange(0, TILE_INPUTS) < INPUTS - first)
    x = tl.load(x_ptrs + first, mask=mask, other=0.0)
    w = tl.load(w_ptrs + first * column_stride, mask=mask[None, :], other=0.0)
    return w.to(tl.float32) * (x.to(tl.float32) * weight)[None, :]


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
    PDL: tl.constexpr,
) -> None:
    """BLOCK columns of one token: the sum of its terms, but for those of other ranks, which nobody wrote."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * token_stride + choice * choice_stride)
        term_ptr = terms_ptr + (token * TOP_K + choice) * width
        mask = column < tl.where(expert >= 0, width, 0)
        total += tl.load(term_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def down_of_pairs(
    inner_PF: torch.Tensor, down_EDF: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """Each token's experts' outputs [T, D], weighted and added in float32 in the order of the choices."""
    _, width, inner = down_EDF.shape
    num_tokens, top_k = ids_TK.shape
    out_TD = inner_PF.new_empty(num_tokens, width)
    _weighted_down[(num_tokens, triton.cdiv(width, tile.outputs))](
        inner_PF,
        down_EDF,
        weights_TK,
        ids_TK,
        out_TD,
        width,
        *down_EDF.stride(),
        *ids_TK.stride(),
        TOP_K=top_k,
        **_constants(tile, inner),
    )
    return out_TD


def mix_experts(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    measured_in: Path | None = None,
    down: DownOfPairs = down_of_pairs,
) -> torch.Tensor:
    """See the contract. `measured_in` holds the plans that were measured on this machine."""
    if hidden_TD.shape[0] == 0:
        return hidden_TD.new_empty(hidden_TD.shape)
    num_experts, width, inner = down_EDF.shape
    num_tokens, top_k = ids_TK.shape
    problem = Problem(num_tokens, num_experts, top_k, width, inner, hidden_TD.itemsize)
    plan = plan_of(problem, facts_of(hidden_TD.device), measured_in)
    return mix_as_planned(plan, hidden_TD, gate_up_E2FD, down_EDF, weights_TK, ids_TK, down)


def mix_as_planned(
    plan: Plan,
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    down: DownOfPairs = down_of_pairs,
) -> torch.Tensor:
    """See the contract: computed as the plan says, for one token at least."""
    inner_PF = hidden_TD.new_empty(ids_TK.numel(), down_EDF.shape[2])
    weights_TK = weights_TK.contiguous()
    if plan.way == "pairs":
        _gate_and_up_of_pairs(hidden_TD, gate_up_E2FD, ids_TK, inner_PF, plan.up)
        return down(inner_PF, down_EDF, weights_TK, ids_TK, plan.down)
    terms_PD = hidden_TD.new_empty(ids_TK.numel(), hidden_TD.shape[1])
    top_k = ids_TK.shape[1]
    if plan.way == "tokens":
        product_by_tokens(hidden_TD, gate_up_E2FD, inner_PF, ids_TK, None, top_k, plan.up, gated=True)
        product_by_tokens(inner_PF, down_EDF, terms_PD, ids_TK, weights_TK, 1, plan.down)
    else:
        aligned = align(ids_TK, down_EDF.shape[0], plan.up.rows)
        grouped_product(hidden_TD, gate_up_E2FD, inner_PF, aligned, None, top_k, plan.up, gated=True)
        grouped_product(inner_PF, down_EDF, terms_PD, aligned, weights_TK, 1, plan.down)
    return _sum_of_choices(terms_PD, ids_TK)


def _gate_and_up_of_pairs(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    ids_TK: torch.Tensor,
    inner_PF: torch.Tensor,
    tile: Tile,
) -> None:
    num_pairs, inner = inner_PF.shape
    _gate_and_up[(num_pairs, triton.cdiv(inner, tile.outputs))](
        hidden_TD,
        gate_up_E2FD,
        ids_TK,
        inner_PF,
        inner,
        *hidden_TD.stride(),
        *gate_up_E2FD.stride(),
        *ids_TK.stride(),
        TOP_K=ids_TK.shape[1],
        **_constants(tile, hidden_TD.shape[1]),
    )


def _constants(tile: Tile, inputs: int) -> dict[str, int]:
    """What both programs of the way "pairs" are compiled and launched with."""
    return {
        "INPUTS": inputs,
        "TILE_OUTPUTS": tile.outputs,
        "TILE_INPUTS": tile.inputs,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        **dependent_launch(),
    }


def _sum_of_choices(terms_PD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    width = terms_PD.shape[1]
    num_tokens, top_k = ids_TK.shape
    out_TD = terms_PD.new_empty(num_tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    _sum_choices[(num_tokens, triton.cdiv(width, block))](
        terms_PD, ids_TK, out_TD, width, *ids_TK.stride(), TOP_K=top_k, BLOCK=block, **dependent_launch()
    )
    return out_TD
