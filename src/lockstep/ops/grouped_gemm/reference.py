"""Shapes: S source rows, P pairs, R padded rows, I inputs, O outputs, E experts, B rows of a block."""

from __future__ import annotations

import torch


def grouped_gemm(
    x_SI: torch.Tensor,
    weight_EOI: torch.Tensor,
    pairs_R: torch.Tensor,
    block_experts: torch.Tensor,
    num_rows: torch.Tensor,
    row_weights_P: torch.Tensor | None,
    pairs_per_row: int,
) -> torch.Tensor:
    """out[p] = row_weights[p] * (weight[expert of p] @ x[p // pairs_per_row]) for the P = S * pairs_per_row pairs.

    `pairs`, `block_experts` and `num_rows` are moe_align's; pairs that it gave no row to are zero. Sums in float32 or
    wider, one rounding to the dtype of x after the row weight (float32, optional).
    """
    num_pairs = x_SI.shape[0] * pairs_per_row
    out_PO = x_SI.new_zeros(num_pairs + 1, weight_EOI.shape[1])
    if num_pairs == 0:
        return out_PO[:0]
    # Padding reads some row, and all of it ends in one more row of the result, which is cut off.
    x_RI = x_SI[(pairs_R // pairs_per_row).clamp(max=x_SI.shape[0] - 1)].float()
    experts_R = block_experts.repeat_interleave(len(pairs_R) // len(block_experts), output_size=len(pairs_R))
    out_RO = x_RI.new_zeros(len(pairs_R), weight_EOI.shape[1])
    for expert, weight_OI in enumerate(weight_EOI):
        out_RO = torch.where((experts_R == expert)[:, None], x_RI @ weight_OI.float().T, out_RO)
    if row_weights_P is not None:
        out_RO = out_RO * row_weights_P.flatten()[pairs_R.clamp(max=num_pairs - 1), None]
    out_PO[pairs_R] = out_RO.to(x_SI.dtype)
    return out_PO[:num_pairs]
