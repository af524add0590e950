"""The Triton program of scaled products. Importing it imports Triton.

Shapes: T rows, I inputs, O outputs; K = ceil(I / 128) blocks of inputs, B = ceil(O / 128) of outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.scaled_mm_fp8.reference import BLOCK
from lockstep.ops.scaled_mm_fp8.tiles import tile_of


# What changes from step to step must not choose another program: it would be compiled while requests wait.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["a_scale_block_stride"])
def _scaled_product(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    a_row_stride: tl.tensor,
    a_input_stride: tl.tensor,
    b_output_stride: tl.tensor,
    b_input_stride: tl.tensor,
    a_scale_row_stride: tl.tensor,
    a_scale_block_stride: tl.tensor,
    b_scale_output_stride: tl.tensor,
    b_scale_block_stride: tl.tensor,
    SCALED_BLOCKS: tl.constexpr,
    OUTPUTS_PER_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A tile of the result. Products are summed by the matrix unit inside a block, in float32 across blocks."""
    # Programs that run together share rows and outputs, so that they find each other's codes in the cache.
    row_tile, output_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = output_tile * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    # What lies beyond the result is computed from the last row and output, and not stored.
    row_read = tl.minimum(row, rows - 1).to(tl.int64)
    output_read = tl.minimum(output, outputs - 1).to(tl.int64)
    input = tl.arange(0, BLOCK)
    a_ptrs = a_ptr + row_read[:, None] * a_row_stride + input[None, :] * a_input_stride
    b_ptrs = b_ptr + output_read[None, :] * b_output_stride + input[:, None] * b_input_stride
    a_scale_ptrs = a_scale_ptr + row_read * a_scale_row_stride
    if SCALED_BLOCKS:
        # All outputs of a tile share it.
        b_scale_ptrs = b_scale_ptr + output_tile * TILE_OUTPUTS // OUTPUTS_PER_SCALE * b_scale_output_stride
    else:
        b_scale_ptrs = b_scale_ptr + output_read // OUTPUTS_PER_SCALE * b_scale_output_stride

    total = tl.zeros((TILE_ROWS, TILE_OUTPUTS), dtype=tl.float32)
    for block in range(tl.cdiv(inputs, BLOCK)):
        if EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            left = inputs - block * BLOCK
            a = tl.load(a_ptrs, mask=input[None, :] < left, other=0.0)
            b = tl.load(b_ptrs, mask=input[:, None] < left, other=0.0)
        if SCALED_BLOCKS:
            scale = tl.load(a_scale_ptrs) * tl.load(b_scale_ptrs)
            a_scale_ptrs += a_scale_block_stride
            b_scale_ptrs += b_scale_block_stride
        if EXACT:
            product = tl.dot(a.to(tl.float16), b.to(tl.float16))
        else:
            product = tl.dot(a, b)
        if SCALED_BLOCKS:
            product *= scale[:, None]
        total += product
        a_ptrs += BLOCK * a_input_stride
        b_ptrs += BLOCK * b_input_stride
    if not SCALED_BLOCKS:
        total *= tl.load(a_scale_ptrs)[:, None] * tl.load(b_scale_ptrs)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + output_read).to(tl.float32)[None, :]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (output < outputs)[None, :],
    )


def scaled_product(
    a_TI: torch.Tensor,
    b_OI: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the contract of scaled_mm_fp8."""
    rows, inputs = a_TI.shape
    outputs = b_OI.shape[0]
    out_TO = torch.empty(rows, outputs, dtype=dtype, device=a_TI.device)
    if rows:
        tile = tile_of(rows, outputs)
        _scaled_product[(triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows))](
            a_TI,
            b_OI,
            a_scale,
            b_scale,
            out_TO if bias_O is None else bias_O,
            out_TO,
            rows,
            outputs,
            inputs,
            *a_TI.stride(),
            *b_OI.stride(),
            *_shared_strides(a_scale),
            *_shared_strides(b_scale),
            SCALED_BLOCKS=a_scale.shape[1] > 1,
            OUTPUTS_PER_SCALE=1 if b_scale.shape[0] == outputs else BLOCK,
            HAS_BIAS=bias_O is not None,
            # The matrix units of some GPUs sum fp8 products to about 14 bits, but those of float16 to float32's.
            EXACT=dtype == torch.float32,
            EVEN=inputs % BLOCK == 0,
            TILE_ROWS=tile.rows,
            TILE_OUTPUTS=tile.outputs,
            BLOCK=BLOCK,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return out_TO


def _shared_strides(scale: torch.Tensor) -> tuple[int, int]:
    """The strides, with 0 along a dim whose one scale serves everything."""
    across, along = (
        stride if size > 1 else 0 for size, stride in zip(scale.shape, scale.stride(), strict=True)
    )
    return across, along
