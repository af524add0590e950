"""The Triton program of add_norm_linear. Importing it imports Triton.

Shapes: T rows, D inputs, O outputs of the weight, F outputs of the operator: O, or half of it when gated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.linear.programs import finish_total, load_weight, multiply, zero_total
from lockstep.ops.linear.tiles import Tile


@triton.jit
def _stream(
    update_ptrs: tl.tensor, residual_ptrs: tl.tensor, total_ptrs: tl.tensor, mask: tl.tensor, owned: tl.tensor
) -> tl.tensor:
    """The new stream in float32, as the next layer reads it: its elements that are `owned` are written."""
    total = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    if update_ptrs is not None:
        total += tl.load(update_ptrs, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(total_ptrs.dtype.element_ty)
    tl.store(total_ptrs, rounded, mask=mask & owned)
    return rounded.to(tl.float32)


# The scale of the norm is one number a row: it is left to the end, so that the rows are read once.
@triton.jit(do_not_specialize=["num_rows"])
def _normed_product(
    update_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    num_rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    update_row_stride: tl.tensor,
    residual_row_stride: tl.tensor,
    weight_row_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """TILE_OUTPUTS outputs of all rows; the first program writes the new stream. EVEN: inputs are whole tiles.

    GATED: outputs n and n + `outputs` of the weight make output n, silu(one) * other.
    """
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    input = tl.arange(0, TILE_INPUTS)
    # What lies beyond the outputs is computed from a weight that exists, and not stored.
    read = tl.minimum(output, outputs - 1)
    up_ptr = weight_ptr + outputs.to(tl.int64) * weight_row_stride
    # On their way before anything is waited for, and used last, so that nothing waits for them either.
    early = load_weight(weight_ptr, read, 0, inputs, weight_row_stride, TILE_INPUTS, EVEN)
    if GATED:
        early_up = load_weight(up_ptr, read, 0, inputs, weight_row_stride, TILE_INPUTS, EVEN)
    wait_for_inputs(PDL)

    far_row = row.to(tl.int64)[None, :]
    update_ptrs = update_ptr
    if update_ptr is not None:
        update_ptrs = update_ptr + far_row * update_row_stride
    residual_ptrs = residual_ptr + far_row * residual_row_stride
    total_ptrs = total_ptr + far_row * inputs
    is_row = (row < num_rows)[None, :]
    is_owned = (row < tl.where(tl.program_id(0) == 0, num_rows, 0))[None, :]
    out = zero_total(ROWS, TILE_OUTPUTS, TILE_INPUTS)
    up_out = zero_total(ROWS, TILE_OUTPUTS, TILE_INPUTS)
    squares = tl.zeros((TILE_INPUTS, ROWS), tl.float32)
    # The first tile's turn is the last.
    for step in range(1, tl.cdiv(inputs, TILE_INPUTS)):
        at = step * TILE_INPUTS + input[:, None]
        weight = load_weight(weight_ptr, read, step * TILE_INPUTS, inputs, weight_row_stride, TILE_INPUTS, EVEN)
        more_update_ptrs = update_ptrs
        if update_ptr is not None:
            more_update_ptrs = update_ptrs + at
        x = _stream(more_update_ptrs, residual_ptrs + at, total_ptrs + at, is_row & (at < inputs), is_owned)
        squares += x * x
        x *= tl.load(norm_weight_ptr + at, mask=at < inputs, other=0.0).to(tl.float32)
        out = multiply(out, weight, x)
        if GATED:
            up = load_weight(up_ptr, read, step * TILE_INPUTS, inputs, weight_row_stride, TILE_INPUTS, EVEN)
            up_out = multiply(up_out, up, x)
    at = input[:, None]
    if update_ptr is not None:
        update_ptrs = update_ptrs + at
    x = _stream(update_ptrs, residual_ptrs + at, total_ptrs + at, is_row & (at < inputs), is_owned)
    squares += x * x
    x *= tl.load(norm_weight_ptr + at, mask=at < inputs, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)[None, :]
    out = finish_total(multiply(out, early, x), ROWS) * scale
    if bias_ptr is not None:
        out += tl.load(bias_ptr + read).to(tl.float32)[:, None]
    if GATED:
        up_out = finish_total(multiply(up_out, early_up, x), ROWS) * scale
        if bias_ptr is not None:
            up_out += tl.load(bias_ptr + outputs + read).to(tl.float32)[:, None]
        out = out * tl.sigmoid(out) * up_out
    out_ptrs = out_ptr + far_row * outputs + output[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_row & (output < outputs)[:, None])


def normed_product(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    tile: Tile,
    *,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract of add_norm_linear, for at most `tile.rows` rows whose elements lie side by side."""
    num_rows, inputs = residual_TD.shape
    outputs = weight_OD.shape[0] // 2 if gated else weight_OD.shape[0]
    norm_weight_D, eps = norm
    out_TF = residual_TD.new_empty((num_rows, outputs))
    total_TD = residual_TD.new_empty((num_rows, inputs))
    _normed_product[(triton.cdiv(outputs, tile.outputs),)](
        update_TD,
        residual_TD,
        norm_weight_D,
        weight_OD,
        bias_O,
        out_TF,
        total_TD,
        num_rows,
        outputs,
        inputs,
        0 if update_TD is None else update_TD.stride(0),
        residual_TD.stride(0),
        weight_OD.stride(0),
        eps,
        ROWS=tile.rows,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        GATED=gated,
        EVEN=inputs % tile.inputs == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(),
    )
    return out_TF, total_TD
