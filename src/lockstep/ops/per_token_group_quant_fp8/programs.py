"""The Triton program of every quantiser. Importing it imports Triton.

Shapes: T rows, D width, G groups of a row, E elements of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.per_token_group_quant_fp8.reference import SMALLEST_SCALE, in_groups, new_scales
from lockstep.ops.per_token_group_quant_fp8.tiles import tile_of


# What changes from step to step must not choose another program: it would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["scale_group_stride"])
def _quantise_groups(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    x_row_stride: tl.tensor,
    x_column_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    UE8M0: tl.constexpr,
) -> None:
    """A tile of TILE_ROWS x TILE_GROUPS groups: read once, held in registers, written once."""
    place = tl.arange(0, TILE_ROWS * TILE_GROUPS)
    row = (tl.program_id(0) * TILE_ROWS + place // TILE_GROUPS).to(tl.int64)
    group = (tl.program_id(1) * TILE_GROUPS + place % TILE_GROUPS).to(tl.int64)
    element = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + element[None, :]
    is_group = (row < num_rows) & (group < num_groups)
    mask = is_group[:, None] & (element < GROUP)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row_stride + column * x_column_stride, mask=mask, other=0.0)
    x = x.to(tl.float32)

    # Compared as integers, |x| is ordered as it is as numbers, with infinity and then NaN above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    is_finite = largest < 0x7F800000
    scale = tl.div_rn(tl.maximum(largest.to(tl.float32, bitcast=True), SMALLEST * LIMIT), LIMIT)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(is_finite, scale, float("nan"))
    tl.store(scale_ptr + row * scale_row_stride + group * scale_group_stride, scale, mask=is_group)

    codes = x * tl.div_rn(1.0, scale)[:, None]
    if codes_ptr.dtype.element_ty == tl.int8:
        # Next to 1.5 * 2^23 float32 holds whole numbers only: the sum rounds, half to even.
        codes = (codes + 12582912.0) - 12582912.0
        codes = tl.where(is_finite[:, None], codes, 0.0)
    codes = codes.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row[:, None] * (num_groups * GROUP) + column, codes, mask=mask)


def quantise(
    x_TD: torch.Tensor, group: int, dtype: torch.dtype, limit: float, *, column_major: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of x in `dtype`, float32 scales of its groups); see the contracts. `limit` is the largest code.

    Raises KernelError when `group` does not divide the width.
    """
    num_groups = in_groups(x_TD, group).shape[-2]
    rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
    num_rows = rows_TD.shape[0]
    codes_TD = torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device)
    scale_TG = new_scales(torch.Size((*x_TD.shape[:-1], num_groups)), column_major, x_TD.device)
    if num_rows:
        tile = tile_of(num_rows, num_groups, group)
        _quantise_groups[(triton.cdiv(num_rows, tile.rows), triton.cdiv(num_groups, tile.groups))](
            rows_TD,
            codes_TD,
            scale_TG,
            num_rows,
            num_groups,
            *rows_TD.stride(),
            *scale_TG.stride()[-2:],
            GROUP=group,
            BLOCK=tile.block,
            TILE_ROWS=tile.rows,
            TILE_GROUPS=tile.groups,
            LIMIT=limit,
            SMALLEST=SMALLEST_SCALE,
            UE8M0=ue8m0,
            num_warps=tile.num_warps,
            # A product fused with the sum after it would round once where the contract rounds twice.
            enable_fp_fusion=False,
        )
    return codes_TD, scale_TG
