"""The Triton program of grouped products, gated or plain. Importing it imports Triton.

Shapes: S source rows, P pairs, R padded rows, I inputs, O outputs, F outputs of a gated product, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.grouped_gemm.tiles import Tile


@triton.jit
def _grouped_product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_rows_ptr: tl.tensor,
    row_weights_ptr: tl.tensor,
    num_pairs: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_row_stride: tl.tensor,
    x_input_stride: tl.tensor,
    expert_stride: tl.tensor,
    output_stride: tl.tensor,
    input_stride: tl.tensor,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
) -> None:
    """A tile of the result. GATED: outputs n and n + `outputs` of the weight make output n, silu(one) * other.

    EVEN says that `inputs` is a multiple of TILE_INPUTS.
    """
    # Programs that run together share rows and weights, so that they find each other's in the cache.
    block, output_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    if block * TILE_ROWS >= tl.load(num_rows_ptr):
        return
    pair = tl.load(pairs_ptr + block * TILE_ROWS + tl.arange(0, TILE_ROWS))
    is_pair = pair < num_pairs
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
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
    pairs_R, block_experts, num_rows = aligned
    num_pairs, outputs = out_PO.shape
    inputs = x_SI.shape[1]
    if not len(block_experts):
        return
    _grouped_product[(triton.cdiv(outputs, tile.outputs), len(block_experts))](
        x_SI,
        weight_EOI,
        out_PO,
        pairs_R,
        block_experts,
        num_rows,
        row_weights_P,
        num_pairs,
        outputs,
        inputs,
        *x_SI.stride(),
        *weight_EOI.stride(),
        PAIRS_PER_ROW=pairs_per_row,
        GATED=gated,
        EVEN=inputs % tile.inputs == 0,
        TILE_ROWS=tile.rows,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
