"""One Triton program for few rows; for more, the programs of the norm, the product and its gate, which may be one."""

from __future__ import annotations

import torch

from lockstep.ops.add_norm_linear.tiles import Problem, tile_of
from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.linear.kernels.triton import linear
from lockstep.ops.linear.tiles import Block, GatedBlock, Tile
from lockstep.ops.rows import refuses_wide_rows


def refuses(signature: Signature) -> str | None:
    dtype = signature["dtype"]
    if dtype != torch.bfloat16:
        # The rows are multiplied before they are scaled: float16 would overflow where a stream grows large.
        return f"multiplies bfloat16, not {dtype}"
    return refuses_wide_rows({"width": max(signature["inputs"], 1)})


def add_norm_linear(
    update_TD: torch.Tensor | None,
    residual_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    from lockstep.ops.add_norm_linear.programs import normed_product
    from lockstep.ops.linear.blocks import block_product, can_be_copied
    from lockstep.ops.linear.gated_blocks import can_be_gated, gated_product
    from lockstep.ops.silu_and_mul.programs import SILU, activate_and_multiply

    outputs, inputs = weight_OD.shape
    tile = tile_of(Problem(residual_TD.shape[0], outputs, inputs, gated))
    streams = (residual_TD,) if update_TD is None else (update_TD, residual_TD)
    if isinstance(tile, Tile) and all(each.stride(1) == 1 for each in (*streams, weight_OD)):
        norm = (norm_weight_D, eps)
        return normed_product(update_TD, residual_TD, norm, weight_OD, bias_O, tile, gated=gated)
    normed_TD, total_TD = normalised(update_TD, residual_TD, norm_weight_D, eps)
    if isinstance(tile, Block) and can_be_copied(normed_TD) and can_be_copied(weight_OD):
        return block_product(normed_TD, weight_OD, bias_O, tile, gated=gated), total_TD
    if isinstance(tile, GatedBlock) and can_be_gated(normed_TD, weight_OD):
        return gated_product(normed_TD, weight_OD, bias_O, tile), total_TD
    out_TO = linear(normed_TD, weight_OD, bias_O)
    return activate_and_multiply(out_TO, SILU) if gated else out_TO, total_TD


def normalised(
    update_TD: torch.Tensor | None, residual_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum's rms_norm, contiguous, and the sum."""
    from lockstep.ops.add_rms_norm.programs import add_and_normalise
    from lockstep.ops.rms_norm.programs import normalise

    if update_TD is None:
        return normalise(residual_TD, norm_weight_D, eps, residual_TD.shape[1]), residual_TD
    return add_and_normalise(update_TD, residual_TD, norm_weight_D, eps)


KERNELS = (
    Kernel(
        op="add_norm_linear",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=add_norm_linear,
        platforms=frozenset({"cuda"}),
        features=frozenset({"triton"}),
        refuses=refuses,
    ),
)
