"""The Triton program of products of many rows whose outputs are gated. Importing it imports Triton.

The weight is read as a pair of matrices, so that one copy brings the gates and the ups of a block beside each other
and one product of matrices has both; its outputs are never written, only silu(gate) * up.

Shapes: T rows, I inputs, F gates and as many ups, O = 2 F.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.linear.blocks import can_be_copied
from lockstep.ops.linear.tiles import GatedBlock

_ALIGNED_BYTES = 16
_INTERPRETED_PROGRAMS = 3
"""Few, so that programs compute several blocks each, as they do on a device."""


@triton.jit
def _block_at(
    turn: tl.tensor, row_blocks: tl.tensor, output_blocks: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Which block of rows and which of outputs comes `turn`-th.

    GROUP blocks of rows, or what is left of them, go through all outputs together: what runs at one time then meets in
    the device's cache, as many different rows as weights.
    """
    first = turn // (GROUP * output_blocks) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    place = turn % (GROUP * output_blocks)
    return first + place % size, place // size


@triton.jit(do_not_specialize=["num_rows"])
def _gated_blocks(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    out: tl.tensor_descriptor,
    bias_ptr: tl.tensor,
    num_rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """silu(gate) * up of ROWS rows and TILE_OUTPUTS gates and ups, block after block until none is left."""
    row_blocks = tl.cdiv(num_rows, ROWS)
    output_blocks = tl.cdiv(outputs, TILE_OUTPUTS)
    wait_for_inputs(PDL)
    # As one loop, so that the next block is on its way while this one's gates are computed.
    for turn in tl.range(tl.program_id(0), row_blocks * output_blocks, tl.num_programs(0), flatten=True):
        row_block, output_block = _block_at(turn, row_blocks, output_blocks, GROUP)
        first_row = row_block * ROWS
        first_output = output_block * TILE_OUTPUTS
        total = tl.zeros((ROWS, 2 * TILE_OUTPUTS), tl.float32)
        for at in range(0, inputs, TILE_INPUTS):
            both = weight.load([0, first_output, at]).reshape(2 * TILE_OUTPUTS, TILE_INPUTS)
            total = tl.dot(x.load([first_row, at]), both.T, total)
        gate, up = tl.split(total.reshape(ROWS, 2, TILE_OUTPUTS).permute(0, 2, 1))
        if bias_ptr is not None:
            output = first_output + tl.arange(0, TILE_OUTPUTS)
            is_output = output < outputs
            gate += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + outputs + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
        gated = gate * tl.sigmoid(gate) * up
        out.store([first_row, first_output], gated.to(out.dtype))


def can_be_gated(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether blocks of them can be copied, and blocks of their result back."""
    is_aligned = weight_OI.shape[0] // 2 * x_TI.itemsize % _ALIGNED_BYTES == 0
    return is_aligned and can_be_copied(x_TI) and can_be_copied(weight_OI)


@cache
def _processors(device: torch.device) -> int:
    if triton.knobs.runtime.interpret:
        return _INTERPRETED_PROGRAMS
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


def gated_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, block: GatedBlock
) -> torch.Tensor:
    """silu(gate) * up, where gate, then up are x @ weight^T + bias, in float32 until it is written.

    `can_be_gated` is true of both matrices.
    """
    num_rows, inputs = x_TI.shape
    outputs = weight_OI.shape[0] // 2
    num_blocks = triton.cdiv(num_rows, block.rows) * triton.cdiv(outputs, block.outputs)
    out_TF = x_TI.new_empty((num_rows, outputs))
    _gated_blocks[(min(num_blocks, _processors(x_TI.device) * block.programs),)](
        TensorDescriptor.from_tensor(x_TI, [block.rows, block.inputs]),
        TensorDescriptor.from_tensor(weight_OI.unflatten(0, (2, outputs)), [2, block.outputs, block.inputs]),
        TensorDescriptor.from_tensor(out_TF, [block.rows, block.outputs]),
        bias_O,
        num_rows,
        outputs,
        inputs,
        ROWS=block.rows,
        TILE_OUTPUTS=block.outputs,
        TILE_INPUTS=block.inputs,
        GROUP=block.group,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **dependent_launch(),
    )
    return out_TF
