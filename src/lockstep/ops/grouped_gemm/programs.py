"""The Triton program of grouped products, gated or plain. Importing it imports Triton.

Shapes: S source rows, P pairs, R padded rows, I inputs, O outputs, F outputs of a gated product, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.grouped_gemm.tiles import Tile


@triton.jit
def _pairs_of_tokens(
    ids_ptr: tl.tensor,
    expert: tl.tensor,
    num_pairs: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """For each token the pair in which it chose the expert, and `num_pairs` where it did not."""
    token = tl.arange(0, ROWS)
    found = tl.zeros((ROWS,), tl.int32) + num_pairs
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        id = tl.load(ids_ptr + token * token_stride + choice * choice_stride, mask=pair < num_pairs, other=-1)
        found = tl.where((pair < num_pairs) & (id == expert), pair, found)
    return found


@triton.jit
def _grouped_product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_rows_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    row_weights_ptr: tl.tensor,
    num_pairs: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_row_stride: tl.tensor,
    x_input_stride: tl.tensor,
    expert_stride: tl.tensor,
    output_stride: tl.tensor,
    input_stride: tl.tensor,
    token_stride: tl.tensor,
    choice_stride: tl.tensor,
    PAIRS_PER_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A tile of the result. GATED: outputs n and n + `outputs` of the weight make output n, silu(one) * other.

    EVEN says that `inputs` is a multiple of TILE_INPUTS. With `ids` a block is a pair instead of aligned rows: the
    first pair of each expert stands for all of them, and the rows are the tokens, TILE_ROWS of them at most.
    """
    wait_for_inputs(PDL)
    # Programs that run together share rows and weights, so that they find each other's in the cache.
    block, output_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    if ids_ptr is None:
        if block * TILE_ROWS >= tl.load(num_rows_ptr):
            return
        pair = tl.load(pairs_ptr + block * TILE_ROWS + tl.arange(0, TILE_ROWS))
        expert = tl.load(block_experts_ptr + block).to(tl.int64)
    else:
        expert = tl.load(ids_ptr + block // TOP_K * token_stride + block % TOP_K * choice_stride).to(tl.int64)
        pair = _pairs_of_tokens(
            ids_ptr, expert, num_pairs, token_stride, choice_stride, TOP_K=TOP_K, ROWS=TILE_ROWS
        )
        if (expert < 0) | (tl.min(pair, 0) < block):
            return
    is_pair = pair < num_pairs
    output = output_tile * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    input = tl.arange(0, TILE_INPUTS)
    # Padding and what lies beyond the outputs are computed from rows that exist, and not stored.
    source = tl.where(is_pair, pair // PAIRS_PER_ROW, 0).to(tl.int64)
    read = tl.minimum(output, outputs - 1).to(tl.int64)
    x_ptrs = x_ptr + source[:, None] * x_row_stride + input[None, :] * x_input_stride
    w_ptrs = weight_ptr + expert * expert_stride + read[None, :] * output_stride + input[:, None] * input_stride
    up_ptrs = w_ptrs + outputs.to(tl.int64) * output_stride

    total = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.float32)
    up_total = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.float32)
    for first in range(0, inputs, TILE_INPUTS):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            left = inputs - first
            x = tl.load(x_ptrs, mask=input[None, :] < left, other=0.0)
            w = tl.load(w_ptrs, mask=input[:, None] < left, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        if GATED:
            if EVEN:
                up = tl.load(up_ptrs)
            else:
                up = tl.load(up_ptrs, mask=input[:, None] < inputs - first, other=0.0)
            up_total = tl.dot(x, up, up_total, input_precision="ieee")
            up_ptrs += TILE_INPUTS * input_stride
        x_ptrs += TILE_INPUTS * x_input_stride
        w_ptrs += TILE_INPUTS * input_stride

    if GATED:
        total = total * tl.sigmoid(total) * up_total
    if row_weights_ptr is not None:
        total *= tl.load(row_weights_ptr + pair, mask=is_pair, other=0.0)[:, None]
    out_ptrs = out_ptr + pair[:, None].to(tl.int64) * outputs + output[None, :]
    mask = is_pair[:, None] & (output < outputs)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_product(
    x_SI: torch.Tensor,
    weight_EOI: torch.Tensor,
    out_PO: torch.Tensor,
    aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    row_weights_P: torch.Tensor | None,
    pairs_per_row: int,
    tile: Tile,
    *,
    gated: bool = False,
) -> None:
    """Writes the rows of `out` (contiguous) whose pairs have a row in `aligned`, blocks of `tile.rows`.

    `gated` takes a weight of 2 F outputs, gate and then up, and writes silu(gate) * up, [P, F].
    """
    num_blocks = len(aligned[1])
    if num_blocks:
        _launch(
            x_SI, weight_EOI, out_PO, aligned, None, row_weights_P, pairs_per_row, tile, num_blocks, gated=gated
        )


def product_by_tokens(
    x_SI: torch.Tensor,
    weight_EOI: torch.Tensor,
    out_PO: torch.Tensor,
    ids_TK: torch.Tensor,
    row_weights_P: torch.Tensor | None,
    pairs_per_row: int,
    tile: Tile,
    *,
    gated: bool = False,
) -> None:
    """The same for as many tokens as the tile has rows at most, with no alignment. An expert is read once.

    No token chooses an expert twice. Pairs with id -1 are left out.
    """
    _launch(
        x_SI,
        weight_EOI,
        out_PO,
        (None, None, None),
        ids_TK,
        row_weights_P,
        pairs_per_row,
        tile,
        ids_TK.numel(),
        gated=gated,
    )


def _launch(
    x_SI: torch.Tensor,
    weight_EOI: torch.Tensor,
    out_PO: torch.Tensor,
    aligned: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    ids_TK: torch.Tensor | None,
    row_weights_P: torch.Tensor | None,
    pairs_per_row: int,
    tile: Tile,
    num_blocks: int,
    *,
    gated: bool,
) -> None:
    num_pairs, outputs = out_PO.shape
    inputs = x_SI.shape[1]
    _grouped_product[(triton.cdiv(outputs, tile.outputs), num_blocks)](
        x_SI,
        weight_EOI,
        out_PO,
        *aligned,
        ids_TK,
        row_weights_P,
        num_pairs,
        outputs,
        inputs,
        *x_SI.stride(),
        *weight_EOI.stride(),
        *((0, 0) if ids_TK is None else ids_TK.stride()),
        PAIRS_PER_ROW=pairs_per_row,
        TOP_K=0 if ids_TK is None else ids_TK.shape[1],
        GATED=gated,
        EVEN=inputs % tile.inputs == 0,
        TILE_ROWS=tile.rows,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
