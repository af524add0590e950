"""The Triton program of the norm with a residual. Importing it imports Triton.

Shapes: T rows (any leading dims), D normalised dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.rows import as_rows, whole_row_tile


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm(
    update_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    update_inner: tl.tensor,
    update_outer_stride: tl.tensor,
    update_inner_stride: tl.tensor,
    update_column_stride: tl.tensor,
    residual_inner: tl.tensor,
    residual_outer_stride: tl.tensor,
    residual_inner_stride: tl.tensor,
    residual_column_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS whole rows: both inputs read once, the sum held in registers, both results written once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    far_column = column.to(tl.int64)
    in_row = column < width
    mask = (row < num_rows)[:, None] & in_row[None, :]
    update_start = (row // update_inner).to(tl.int64) * update_outer_stride
    update_start += (row % update_inner).to(tl.int64) * update_inner_stride
    residual_start = (row // residual_inner).to(tl.int64) * residual_outer_stride
    residual_start += (row % residual_inner).to(tl.int64) * residual_inner_stride
    update_ptrs = update_ptr + update_start[:, None] + (far_column * update_column_stride)[None, :]
    residual_ptrs = residual_ptr + residual_start[:, None] + (far_column * residual_column_stride)[None, :]
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    wait_for_inputs(PDL, NEXT_FIRST=True)
    update = tl.load(update_ptrs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    # What is normalised is the sum as the next layer reads it.
    total = (residual + update).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / width + eps)
    out = total * scale[:, None] * weight[None, :]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def add_and_normalise(
    update_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract of add_rms_norm. The sum lies where the residual was."""
    update, residual = as_rows(update_TD), as_rows(residual_TD)
    out_TD = torch.empty(update_TD.shape, dtype=residual_TD.dtype, device=update_TD.device)
    if update.num:
        tile = whole_row_tile(update.num, update.width)
        _add_rms_norm[(triton.cdiv(update.num, tile.rows),)](
            update.values,
            residual.values,
            weight_D.contiguous(),
            out_TD,
            update.num,
            update.width,
            *update.place,
            *residual.place,
            eps,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            **dependent_launch(),
        )
    return out_TD, residual.values
