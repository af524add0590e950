"""The Triton program of products with rows for tensor cores to multiply. Importing it imports Triton.

Weights and rows are copied by the device's own engine, tile by tile, which fills up with zeros what lies beyond them.
Source: CUDA Programming Guide, "Tensor Memory Access".

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lockstep.ops.arrivals import counters_of
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.linear.programs import sum_of_parts
from lockstep.ops.linear.tiles import Block

_ALIGNED_BYTES = 16
_CAPABILITIES = (9, 10)
"""Major compute capabilities: Hopper, and Blackwell of data centres."""


@triton.jit
def _fetch_ahead(
    weight_ptr: tl.tensor, output: tl.tensor, first: tl.tensor, num_inputs: tl.tensor, row_stride: tl.tensor
) -> None:
    """Some inputs of each output, none or a multiple of 16 bytes, are on their way to the device's cache."""
    start_ptrs = weight_ptr + output.to(tl.int64) * row_stride + first
    num_bytes = tl.zeros_like(output) + num_inputs * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    if num_inputs > 0:
        tl.inline_asm_elementwise(
            "{ .reg .b64 start; cvta.to.global.u64 start, $1;"
            " cp.async.bulk.prefetch.L2.global [start], $2; mov.b32 $0, 0; }",
            "=r,l,r",
            [start_ptrs.to(tl.int64, bitcast=True), num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _block_product(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    weight_row_stride: tl.tensor,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_OUTPUTS outputs of ROWS rows, of a part of the inputs. Programs that share weights are neighbours.

    GATED: outputs n and n + `outputs` of the weight make output n, silu(one) * other, of all the inputs.
    """
    first_row = tl.program_id(0) * ROWS
    first_output = tl.program_id(1) * TILE_OUTPUTS
    part = tl.program_id(2)
    row = first_row + tl.arange(0, ROWS)
    output = first_output + tl.arange(0, TILE_OUTPUTS)
    share = tl.cdiv(tl.cdiv(inputs, TILE_INPUTS), SPLITS) * TILE_INPUTS
    first = part * share
    end = tl.minimum(first + share, inputs)
    # Weights are fixed: what the first neighbour asks for here, all of them find near when their rows are there.
    if PDL and AHEAD > 0:
        read = tl.minimum(output, outputs - 1)
        num_inputs = tl.where(first_row == 0, tl.minimum(end - first, AHEAD), 0)
        _fetch_ahead(weight_ptr, read, first, num_inputs, weight_row_stride)
        if GATED:
            _fetch_ahead(weight_ptr, outputs + read, first, num_inputs, weight_row_stride)
    wait_for_inputs(PDL)

    total = tl.zeros((TILE_OUTPUTS, ROWS), tl.float32)
    up_total = tl.zeros((TILE_OUTPUTS, ROWS), tl.float32)
    for at in range(first, end, TILE_INPUTS):
        rows = x.load([first_row, at]).T
        total = tl.dot(weight.load([first_output, at]), rows, total)
        if GATED:
            up_total = tl.dot(weight.load([outputs + first_output, at]), rows, up_total)

    place = row.to(tl.int64)[None, :] * outputs + output[:, None]
    mask = (row < num_rows)[None, :] & (output < outputs)[:, None]
    is_last = True
    if SPLITS > 1:
        size = num_rows.to(tl.int64) * outputs
        counter_ptr = counters_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        total, is_last = sum_of_parts(total, part, partial_ptr, counter_ptr, place, mask, size, SPLITS)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if bias_ptr is not None:
            up_bias = tl.load(bias_ptr + outputs + output, mask=output < outputs, other=0.0)
            up_total += up_bias.to(tl.float32)[:, None]
        total = total * tl.sigmoid(total) * up_total
    if is_last:
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def can_be_copied(matrix: torch.Tensor) -> bool:
    """Whether tiles of it can: elements of a row side by side, each row at a multiple of 16 bytes, on such a device."""
    starts = (matrix.data_ptr(), matrix.stride(0) * matrix.itemsize)
    is_aligned = matrix.stride(1) == 1 and not any(start % _ALIGNED_BYTES for start in starts)
    return is_aligned and matrix.numel() > 0 and _copies_tiles()


@cache
def _copies_tiles() -> bool:
    """True of devices that also have the shared memory for blocks, and where a processor interprets them."""
    if triton.knobs.runtime.interpret:
        return True
    return triton.runtime.driver.active.get_current_target().arch // 10 in _CAPABILITIES


def block_product(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    block: Block,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """x @ weight^T + bias, in float32 until it is written. `can_be_copied` is true of both matrices.

    `gated`: the outputs are gate, then up, and the result is silu(gate) * up, by a block of one split.
    """
    num_rows, inputs = x_TI.shape
    outputs = weight_OI.shape[0] // 2 if gated else weight_OI.shape[0]
    grid = (triton.cdiv(num_rows, block.rows), triton.cdiv(outputs, block.outputs), block.splits)
    out_TO = x_TI.new_empty((num_rows, outputs))
    partial_PTO = counters = None
    if block.splits > 1:
        partial_PTO = x_TI.new_empty((block.splits, num_rows, outputs), dtype=torch.float32)
        counters = counters_of(x_TI.device)
    _block_product[grid](
        TensorDescriptor.from_tensor(x_TI, [block.rows, block.inputs]),
        TensorDescriptor.from_tensor(weight_OI, [block.outputs, block.inputs]),
        weight_OI,
        bias_O,
        out_TO,
        partial_PTO,
        counters,
        num_rows,
        outputs,
        inputs,
        weight_OI.stride(0),
        ROWS=block.rows,
        TILE_OUTPUTS=block.outputs,
        TILE_INPUTS=block.inputs,
        SPLITS=block.splits,
        AHEAD=block.ahead,
        GATED=gated,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **dependent_launch(),
    )
    return out_TO
