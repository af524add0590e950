"""The Triton program of begin_rows. Importing it imports Triton.

Shapes: T rows, S sequences, V vocabulary, D model, P positions, R2 rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.rows import power_of_two


@triton.jit
def _begin(
    token_ids_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    last_tokens_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    angles_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_positions: tl.tensor,
    table_stride: tl.tensor,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL, NEXT_FIRST=True)
    token_id = tl.load(token_ids_ptr + row)
    if HAS_SOURCES:
        token_id += tl.load(last_tokens_ptr + tl.load(sources_ptr + row))
    position = tl.load(positions_ptr + row)
    column, pair = tl.arange(0, BLOCK), tl.arange(0, PAIR_BLOCK)
    hidden = tl.load(table_ptr + token_id * table_stride + column, mask=column < WIDTH)
    cos = tl.load(cos_sin_ptr + position * PAIRS + pair, mask=pair < PAIRS)
    sin = tl.load(cos_sin_ptr + (num_positions + position) * PAIRS + pair, mask=pair < PAIRS)
    tl.store(hidden_ptr + row * WIDTH + column, hidden, mask=column < WIDTH)
    tl.store(angles_ptr + row * PAIRS + pair, cos, mask=pair < PAIRS)
    tl.store(angles_ptr + (num_rows + row) * PAIRS + pair, sin, mask=pair < PAIRS)


def begin(
    token_ids_T: torch.Tensor,
    sources_T: torch.Tensor | None,
    last_tokens_S: torch.Tensor | None,
    positions_T: torch.Tensor,
    table_VD: torch.Tensor,
    cos_sin_2PR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract of begin_rows."""
    num_rows, width = len(token_ids_T), table_VD.shape[1]
    _, num_positions, pairs = cos_sin_2PR.shape
    hidden_TD = table_VD.new_empty((num_rows, width))
    angles_2TR = cos_sin_2PR.new_empty((2, num_rows, pairs))
    if num_rows:
        block = power_of_two(width)
        _begin[(num_rows,)](
            token_ids_T.contiguous(),
            None if sources_T is None else sources_T.contiguous(),
            last_tokens_S,
            positions_T.contiguous(),
            table_VD if table_VD.stride(1) == 1 else table_VD.contiguous(),
            cos_sin_2PR.contiguous(),
            hidden_TD,
            angles_2TR,
            num_rows,
            num_positions,
            table_VD.stride(0) if table_VD.stride(1) == 1 else width,
            WIDTH=width,
            PAIRS=pairs,
            HAS_SOURCES=sources_T is not None,
            BLOCK=block,
            PAIR_BLOCK=power_of_two(pairs),
            num_warps=min(max(block // 256, 1), 16),
            **dependent_launch(),
        )
    return hidden_TD, angles_2TR
