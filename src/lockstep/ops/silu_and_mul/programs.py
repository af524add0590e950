"""The Triton program of gated activations. Importing it imports Triton.

Shapes: T rows (any leading dims), F width of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.rows import as_rows, elementwise_tile

SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit(do_not_specialize=["num_rows"])
def _activate_and_multiply(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS x BLOCK elements of the result. Programs beside each other read beside each other."""
    num_blocks = tl.cdiv(width, BLOCK)
    row_tile = tl.program_id(0) // num_blocks
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) - row_tile * num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    far_column = column.to(tl.int64)
    gate_ptrs = x_ptr + start[:, None] + (far_column * column_stride)[None, :]
    up_ptrs = x_ptr + start[:, None] + ((far_column + width) * column_stride)[None, :]
    wait_for_inputs(PDL, NEXT_FIRST=True)
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (gate + 0.044715 gate^3).
        twice_u = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        active = gate / (1.0 + tl.exp(-twice_u))
    out = (active * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * width + column[None, :], out, mask=mask)


def activate_and_multiply(x_T2F: torch.Tensor, activation: int) -> torch.Tensor:
    """activation(first half) * second half, for SILU, GELU or GELU_TANH; see the contracts."""
    rows = as_rows(x_T2F)
    width = rows.width // 2
    out_TF = torch.empty((*x_T2F.shape[:-1], width), dtype=x_T2F.dtype, device=x_T2F.device)
    if out_TF.numel():
        tile = elementwise_tile(rows.num, width)
        _activate_and_multiply[(triton.cdiv(rows.num, tile.rows) * triton.cdiv(width, tile.block),)](
            rows.values,
            out_TF,
            rows.num,
            width,
            *rows.place,
            ACTIVATION=activation,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            **dependent_launch(),
        )
    return out_TF
