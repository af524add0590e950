"""The Triton program of the plain norms. Importing it imports Triton.

Shapes: T rows (any leading dims), D normalised dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.rows import as_rows, whole_row_tile


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_measured: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS whole rows: read once, held in registers, written once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < width
    mask = (row < num_rows)[:, None] & in_row[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x = tl.load(x_ptr + start[:, None] + (column.to(tl.int64) * column_stride)[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    squares = tl.where((column < num_measured)[None, :], x * x, 0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / num_measured + eps)
    out = x * scale[:, None] * weight[None, :]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def normalise(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_measured: int) -> torch.Tensor:
    """x / sqrt(mean of the first `num_measured` squares + eps) * weight; see the contracts."""
    rows = as_rows(x_TD)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows.num:
        tile = whole_row_tile(rows.num, rows.width)
        _rms_norm[(triton.cdiv(rows.num, tile.rows),)](
            rows.values,
            weight_D.contiguous(),
            out_TD,
            rows.num,
            rows.width,
            num_measured,
            *rows.place,
            eps,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
        )
    return out_TD
