"""One product for each expert that is hit: reads the blocks on the host, so no graph can hold it.

Shapes: S source rows, P pairs, R padded rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from itertools import groupby

import torch

from lockstep.ops.contract import Kernel


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
    num_pairs = x_SI.shape[0] * pairs_per_row
    out_PO = x_SI.new_zeros(num_pairs, weight_EOI.shape[1])
    end = 0
    for expert, blocks in groupby(block_experts.tolist()):
        start, end = end, end + sum(1 for _ in blocks) * (len(pairs_R) // len(block_experts))
        if expert < 0:
            break
        pairs = pairs_R[start:end]
        pairs = pairs[pairs < num_pairs]
        rows_RI = x_SI.index_select(0, pairs // pairs_per_row)
        found_RO = rows_RI @ weight_EOI[expert].T
        if row_weights_P is not None:
            found_RO = (found_RO * row_weights_P.flatten()[pairs, None]).to(x_SI.dtype)
        out_PO.index_copy_(0, pairs.long(), found_RO)
    return out_PO


KERNELS = (
    Kernel(
        op="grouped_gemm",
        provider="torch",
        function=grouped_gemm,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
