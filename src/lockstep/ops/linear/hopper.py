"""Products on Hopper by a kernel in CUDA C++, of rows that tensor cores multiply. Importing it imports NVIDIA's
bindings.

Shapes: T rows, I inputs, O outputs of the weight, F of the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path

import torch

from lockstep.ops.contract import Signature
from lockstep.ops.cuda_program import (
    CudaProgram,
    Launch,
    TensorMap,
    architecture_of,
    hopper_source,
    machine_code,
    tensor_map,
)
from lockstep.ops.linear.blocks import can_be_copied
from lockstep.ops.linear.hopper_blocks import (
    BLOCK_INPUTS,
    COPY_REGISTERS,
    MOST_ROWS,
    HopperBlock,
    block_of,
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


def source(
    block: HopperBlock, dtype: torch.dtype, *, gated: bool = False, has_bias: bool = False, best: bool = False
) -> str:
    """CUDA C++ for one block. `best`: it writes the largest results of rows, not all of them."""
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
        "BEST": int(best),
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
    best: bool,
    device: torch.device,
    cache_dir: Path | None,
) -> CudaProgram:
    text = source(block, dtype, gated=gated, has_bias=has_bias, best=best)
    return CudaProgram(text, "product", device, cache_dir, shared_bytes=shared_bytes(block))


def programs(
    signature: Signature, cache_dir: Path, device: torch.device, *, gated: bool = False, best: bool = False
) -> Iterator[Callable[[], object]]:
    """Of each number of rows, as functions that compile into `cache_dir`; the most rows first, as an engine starts."""
    outputs, inputs = signature["outputs"], signature["inputs"]
    counts = (MOST_ROWS, *range(1, MOST_ROWS))
    for block in dict.fromkeys(block_of(count, outputs, inputs, gated=gated) for count in counts):
        if block is not None and not (best and block.splits > 1):
            has_bias = signature.get("bias", False)
            text = source(block, signature["dtype"], gated=gated, has_bias=has_bias, best=best)
            yield partial(machine_code, text, architecture_of(device), cache_dir)


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
    num_rows = len(x_TI)
    outputs = weight_OI.shape[0] // 2 if gated else weight_OI.shape[0]
    out_TF = x_TI.new_empty((num_rows, outputs))
    of_block = 32 * block.warpgroups if gated else 64 * block.warpgroups
    turns = -(-num_rows // block.rows) * -(-outputs // of_block)
    clusters = turns if block.splits > 1 else min(turns, block.clusters)
    program = _program(block, x_TI.dtype, gated, bias_O is not None, False, x_TI.device, cache_dir)
    _start(program, x_TI, weight_OI, bias_O, out_TF, outputs, block, clusters)
    return out_TF


def hopper_best(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, block: HopperBlock, cache_dir: Path | None
) -> torch.Tensor:
    """The best of each row of what `hopper_product` gives, bit for bit: int64 [T, B], a candidate as ops/argmax has it
    for each of B shares of the outputs. The block is one of all rows and inputs: see `finds_best`."""
    num_rows, outputs = len(x_TI), len(weight_OI)
    clusters = min(-(-outputs // (64 * block.warpgroups)), block.clusters)
    shape = (num_rows, clusters * block.warpgroups)
    best_TB = torch.empty(shape, dtype=torch.int64, device=x_TI.device)
    program = _program(block, x_TI.dtype, False, False, True, x_TI.device, cache_dir)
    _start(program, x_TI, weight_OI, None, best_TB, outputs, block, clusters)
    return best_TB


def finds_best(block: HopperBlock, num_rows: int) -> bool:
    """Whether a thread block has all of the sums that it compares."""
    return block.splits == 1 and num_rows <= block.rows


def _start(
    program: CudaProgram,
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out: torch.Tensor,
    outputs: int,
    block: HopperBlock,
    clusters: int,
) -> None:
    num_rows, inputs = x_TI.shape
    dtype, of_weight, gated = x_TI.dtype, 64 * block.warpgroups, outputs < len(weight_OI)
    program.launch(
        _launch(block, clusters),
        (
            _map_of(weight_OI.data_ptr(), dtype, len(weight_OI), inputs, weight_OI.stride(0), of_weight, gated),
            _map_of(x_TI.data_ptr(), dtype, num_rows, inputs, x_TI.stride(0), block.rows, False),
            ctypes.c_void_p(None if bias_O is None else bias_O.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_uint32(num_rows),
            ctypes.c_uint32(outputs),
            ctypes.c_uint32(inputs),
            ctypes.c_uint32(weight_OI.numel() <= _SMALL),
        ),
    )
