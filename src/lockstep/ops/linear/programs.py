"""The Triton program of products with few rows. Importing it imports Triton.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.arrivals import arrives_last, counters_of
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.linear.tiles import Tile


@triton.jit
def load_weight(
    weight_ptr: tl.tensor,
    output: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    row_stride: tl.tensor,
    TILE_INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Some outputs' rows of a weight, from input `first`; zeros from `end` on, which EVEN says is not reached."""
    input = first + tl.arange(0, TILE_INPUTS)
    ptrs = weight_ptr + output.to(tl.int64)[:, None] * row_stride + input[None, :]
    if EVEN:
        weight = tl.load(ptrs)
    else:
        weight = tl.load(ptrs, mask=(input < end)[None, :], other=0.0)
    return weight


@triton.jit
def multiply(total: tl.tensor, weight: tl.tensor, x: tl.tensor) -> tl.tensor:
    """total + weight @ x for x of several columns; for one, the terms of that sum, one for each input."""
    if x.shape[1] == 1:
        total += weight.to(tl.float32) * tl.trans(x).to(tl.float32)
    else:
        total = tl.dot(weight, x.to(weight.dtype), total)
    return total


@triton.jit
def zero_total(ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr) -> tl.tensor:
    """What `multiply` begins with."""
    WIDTH: tl.constexpr = TILE_INPUTS if ROWS == 1 else ROWS
    return tl.zeros((TILE_OUTPUTS, WIDTH), tl.float32)


@triton.jit
def finish_total(total: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """[output, row] of what `multiply` ended with."""
    if ROWS == 1:
        total = tl.sum(total, axis=1)[:, None]
    return total


@triton.jit
def sum_of_parts(
    total: tl.tensor,
    part: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """All parts' sum, and whether this program came last and has it. `place` in a part of `size` elements.

    Parts are added in their order, whoever comes last, so that each run gives the same bits.
    """
    tl.store(partial_ptr + part.to(tl.int64) * size + place, total, mask=mask)
    is_last = arrives_last(counter_ptr, SPLITS)
    total = tl.zeros_like(total)
    if is_last:
        for each in tl.static_range(SPLITS):
            total += tl.load(partial_ptr + each * size + place, mask=mask, other=0.0, cache_modifier=".cg")
    return total, is_last


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_row_stride: tl.tensor,
    weight_row_stride: tl.tensor,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_OUTPUTS outputs of all rows, of a part of the inputs. EVEN says that every part is whole tiles."""
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    # What lies beyond the outputs is computed from a weight that exists, and not stored.
    read = tl.minimum(output, outputs - 1)
    share = tl.cdiv(tl.cdiv(inputs, TILE_INPUTS), SPLITS) * TILE_INPUTS
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, inputs)
    # On its way before anything is waited for, and used last, so that nothing waits for it either.
    early = load_weight(weight_ptr, read, first, end, weight_row_stride, TILE_INPUTS, EVEN)
    wait_for_inputs(PDL)

    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * x_row_stride
    input = tl.arange(0, TILE_INPUTS)
    is_row = (row < num_rows)[None, :]
    total = zero_total(ROWS, TILE_OUTPUTS, TILE_INPUTS)
    for at in range(first + TILE_INPUTS, end, TILE_INPUTS):
        weight = load_weight(weight_ptr, read, at, end, weight_row_stride, TILE_INPUTS, EVEN)
        x = tl.load(x_ptrs + (at + input)[:, None], mask=is_row & (at + input < end)[:, None], other=0.0)
        total = multiply(total, weight, x)
    x = tl.load(x_ptrs + (first + input)[:, None], mask=is_row & (first + input < end)[:, None], other=0.0)
    total = finish_total(multiply(total, early, x), ROWS)

    place = row.to(tl.int64)[None, :] * outputs + output[:, None]
    mask = is_row & (output < outputs)[:, None]
    is_last = True
    if SPLITS > 1:
        size = num_rows.to(tl.int64) * outputs
        counter_ptr = counters_ptr + tl.program_id(0)
        total, is_last = sum_of_parts(
            total, tl.program_id(1), partial_ptr, counter_ptr, place, mask, size, SPLITS
        )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + read).to(tl.float32)[:, None]
    if is_last:
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """x @ weight^T + bias for at most `tile.rows` rows; elements of a row lie side by side. See the contract."""
    num_rows, inputs = x_TI.shape
    outputs = weight_OI.shape[0]
    num_tiles = triton.cdiv(outputs, tile.outputs)
    out_TO = x_TI.new_empty((num_rows, outputs))
    partial_PTO = counters = None
    if tile.splits > 1:
        partial_PTO = x_TI.new_empty((tile.splits, num_rows, outputs), dtype=torch.float32)
        counters = counters_of(x_TI.device)
    _product[(num_tiles, tile.splits)](
        x_TI,
        weight_OI,
        bias_O,
        out_TO,
        partial_PTO,
        counters,
        num_rows,
        outputs,
        inputs,
        x_TI.stride(0),
        weight_OI.stride(0),
        ROWS=tile.rows,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        SPLITS=tile.splits,
        EVEN=inputs % (tile.inputs * tile.splits) == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
    return out_TO
