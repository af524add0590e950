"""The Triton program of choose_greedy. Importing it imports Triton.

Shapes: R rows, V vocabulary, B tiles of a row, S sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lockstep.ops.argmax.programs import best_of_row, best_of_tiles, packed, place_of, value_of
from lockstep.ops.dependent_launch import dependent_launch, wait_for_inputs
from lockstep.ops.rows import power_of_two

_TILES_OF_A_WARP = 128


@triton.jit
def _keep_best(
    best_ptr: tl.tensor,
    owners_ptr: tl.tensor,
    last_tokens_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    owner = tl.load(owners_ptr + row)
    best = best_of_row(best_ptr, row, num_tiles, TILES)
    place = place_of(best)
    tl.store(packed_ptr + row, place.to(tl.int32))
    tl.store(packed_ptr + num_rows + row, value_of(best).to(tl.int32, bitcast=True))
    tl.store(last_tokens_ptr + owner, place, mask=owner != 0)


def choose(logits_RV: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor) -> torch.Tensor:
    """See the contract of choose_greedy."""
    return choose_of(best_of_tiles(packed(logits_RV)), owners_R, last_tokens_S)


def choose_of(best_RB: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor) -> torch.Tensor:
    """What choose_greedy does with the best candidates [R, B] of each row, as `best_of_tiles` gives them."""
    num_rows, num_tiles = best_RB.shape
    packed_2R = torch.empty(2, num_rows, dtype=torch.int32, device=best_RB.device)
    if num_rows:
        _keep_best[(num_rows,)](
            best_RB,
            owners_R.contiguous(),
            last_tokens_S,
            packed_2R,
            num_rows,
            num_tiles,
            TILES=power_of_two(num_tiles),
            num_warps=1 if num_tiles <= _TILES_OF_A_WARP else 4,
            **dependent_launch(),
        )
    return packed_2R
