"""The Triton program of layer_norm. Importing it imports Triton.

Shapes: T rows (any leading dims), D normalised dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.rows import as_rows, whole_row_tile


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    eps: tl.tensor,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS whole rows: read once, held in registers for the mean and then the variance, written once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < width
    mask = (row < num_rows)[:, None] & in_row[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x_ptrs = x_ptr + start[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    out = centred * scale[:, None]
    if HAS_WEIGHT:
        out *= tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def normalise(
    x_TD: torch.Tensor, weight_D: torch.Tensor | None, bias_D: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See the contract of layer_norm."""
    rows = as_rows(x_TD)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows.num:
        tile = whole_row_tile(rows.num, rows.width)
        _layer_norm[(triton.cdiv(rows.num, tile.rows),)](
            rows.values,
            out_TD if weight_D is None else weight_D.contiguous(),
            out_TD if bias_D is None else bias_D.contiguous(),
            out_TD,
            rows.num,
            rows.width,
            *rows.place,
            eps,
            HAS_WEIGHT=weight_D is not None,
            HAS_BIAS=bias_D is not None,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
        )
    return out_TD
