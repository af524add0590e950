"""Products on Hopper by a kernel in CUDA C++, of rows that tensor cores multiply. Importing it imports NVIDIA's
bindings.

Shapes: T rows, I inputs, O outputs of the weight, F of the result.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path

import torch

from lockstep.ops.cuda_program import CudaProgram, Launch, TensorMap, hopper_source, tensor_map
from lockstep.ops.linear.blocks import can_be_copied
from lockstep.ops.linear.hopper_blocks import (
    BLOCK_INPUTS,
    COPY_REGISTERS,
    HopperBlock,
    registers,
    result_rows,
    rows_at_once,
    shared_bytes,
)

_SOURCE = Path(__file__).with_name("hopper.cu")
_SMALL = 1 << 23
"""Numbers of a weight that is read so quickly that the next kernel starts before this one's rows are there."""

_ALIGNED = 8
"""Numbers that are copied or written together."""


def can_be_multiplied(weight_OI: torch.Tensor, *, gated: bool) -> bool:
    """Whether the kernel reads it and rows of its inputs side by side, and writes rows of its outputs."""
    outputs = weight_OI.shape[0] // 2 if gated else weight_OI.shape[0]
    return outputs % _ALIGNED == weight_OI.shape[1] % _ALIGNED == 0 and can_be_copied(weight_OI)


def source(block: HopperBlock, dtype: torch.dtype, *, gated: bool, has_bias: bool) -> str:
    """CUDA C++ for one block."""
    facts = {
        "WARPGROUPS": block.warpgroups,
        "TOKENS": block.rows,
        "STAGES": block.stages,
        "SPLITS": block.splits,
        "RESULT_ROWS": result_rows(block),
        "REGISTERS": registers(block),
        "COPY_REGISTERS": COPY_REGISTERS,
        "GATED": int(gated),
        "BIAS": int(has_bias),
        "HALF": int(dtype == torch.float16),
        "ROWS": rows_at_once(block),
    }
    return hopper_source(facts, _multiply(rows_at_once(block), dtype), _SOURCE.read_text())


def _multiply(rows: int, dtype: torch.dtype) -> str:
    """MULTIPLY(totals, weight, rows): the instruction names each of its registers."""
    count = rows // 2
    totals = ", ".join(f"%{at}" for at in range(count))
    operands = ", ".join(f'"+f"((d)[{at}])' for at in range(count))
    kind = "f16" if dtype == torch.float16 else "bf16"
    return (
        "#define MULTIPLY(d, a, b) asm volatile("
        f'"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{kind}.{kind} {{{totals}}}, %{count}, %{count + 1}, '
        f'1, 1, 1, 0, 0;" : {operands} : "l"(a), "l"(b))'
    )


@cache
def _program(
    block: HopperBlock,
    dtype: torch.dtype,
    gated: bool,
    has_bias: bool,
    device: torch.device,
    cache_dir: Path | None,
) -> CudaProgram:
    text = source(block, dtype, gated=gated, has_bias=has_bias)
    return CudaProgram(text, "product", device, cache_dir, shared_bytes=shared_bytes(block))


@lru_cache(maxsize=8192)
def _map_of(
    pointer: int, dtype: torch.dtype, rows: int, inputs: int, stride: int, box_rows: int, pairs: bool
) -> TensorMap:
    """The same for the same place and shape, whatever lies there. `pairs`: eight gates beside the eight ups of each."""
    if not pairs:
        return tensor_map(pointer, dtype, (inputs, rows), (stride,), (BLOCK_INPUTS, box_rows))
    width = rows // 2
    # Each dim has a stride of its own: none need be a multiple of the one before.
    strides = (stride, width * stride, 8 * stride)
    return tensor_map(pointer, dtype, (inputs, 8, 2, width // 8), strides, (BLOCK_INPUTS, 8, 2, box_rows // 16))


@cache
def _launch(block: HopperBlock, clusters: int) -> Launch:
    threads = 128 * (block.warpgroups + 1)
    return Launch(clusters * block.splits, block.splits, threads, shared_bytes(block), early=True)


def hopper_product(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    block: HopperBlock,
    cache_dir: Path | None,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """x @ weight^T + bias, in float32 until it is written; `gated`: silu(gate) * up of it.

    `can_be_multiplied` is true of the weight, `can_be_copied` of the rows. The compiled kernel is kept in `cache_dir`,
    if one is given.
    """
    num_rows, inputs = x_TI.shape
    weight_outputs = weight_OI.shape[0]
    outputs = weight_outputs // 2 if gated else weight_outputs
    out_TF = x_TI.new_empty((num_rows, outputs))
    of_weight = 64 * block.warpgroups
    blocks = -(-num_rows // block.rows) * -(-outputs // (of_weight // 2 if gated else of_weight))
    dtype = x_TI.dtype
    program = _program(block, dtype, gated, bias_O is not None, x_TI.device, cache_dir)
    program.launch(
        _launch(block, blocks if block.splits > 1 else min(blocks, block.clusters)),
        (
            _map_of(weight_OI.data_ptr(), dtype, weight_outputs, inputs, weight_OI.stride(0), of_weight, gated),
            _map_of(x_TI.data_ptr(), dtype, num_rows, inputs, x_TI.stride(0), block.rows, False),
            ctypes.c_void_p(None if bias_O is None else bias_O.data_ptr()),
            ctypes.c_void_p(out_TF.data_ptr()),
            ctypes.c_uint32(num_rows),
            ctypes.c_uint32(outputs),
            ctypes.c_uint32(inputs),
            ctypes.c_uint32(weight_OI.numel() <= _SMALL),
        ),
    )
    return out_TF
