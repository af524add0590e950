"""One Triton program for each tile of outputs and block of rows."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel, Signature
from lockstep.ops.grouped_gemm.tiles import default_tile, facts_of


def _refuses(signature: Signature) -> str | None:
    rows = signature["block_size"]
    if rows < 16 or rows > 128 or rows & (rows - 1):
        return f"multiplies blocks of 16, 32, 64 or 128 rows, not {rows}"
    return None


def grouped_gemm(
    x_SI: torch.Tensor,
    weight_EOI: torch.Tensor,
    pairs_R: torch.Tensor,
    block_experts: torch.Tensor,
    num_rows: torch.Tensor,
    row_weights_P: torch.Tensor | None,
    pairs_per_row: int,
) -> torch.Tensor:
    """See the contract."""
    from lockstep.ops.grouped_gemm.programs import grouped_product

    out_PO = x_SI.new_zeros(x_SI.shape[0] * pairs_per_row, weight_EOI.shape[1])
    if len(block_experts):
        tile = default_tile(
            len(pairs_R) // len(block_experts), x_SI.itemsize, facts_of(x_SI.device).shared_bytes
        )
        aligned = (pairs_R, block_experts, num_rows)
        grouped_product(x_SI, weight_EOI, out_PO, aligned, row_weights_P, pairs_per_row, tile)
    return out_PO


KERNELS = (
    Kernel(
        op="grouped_gemm",
        provider="triton",
        verified_on=("NVIDIA H100",),
        function=grouped_gemm,
        platforms=frozenset({"cuda", "rocm", "musa"}),
        features=frozenset({"triton"}),
        refuses=_refuses,
    ),
)
