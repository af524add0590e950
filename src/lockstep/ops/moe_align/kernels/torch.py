"""One stable sort. Waits for nothing, so it can be recorded in a graph.

Shapes: T tokens, K experts of each token, P = T * K pairs, E experts, R padded rows, B blocks.
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.moe_align.reference import num_padded_rows


def moe_align(
    ids_TK: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the contract."""
    num_pairs, device = ids_TK.numel(), ids_TK.device
    num_rows = num_padded_rows(num_pairs, num_experts, block_size)
    # Experts of other ranks count as one more, which is sorted last and gets no rows.
    ids_P = ids_TK.flatten().long()
    sorted_P, order_P = torch.where(ids_P < 0, num_experts, ids_P).sort(stable=True)
    starts_E = torch.searchsorted(sorted_P, torch.arange(num_experts + 1, device=device))
    counts_E = starts_E.diff()
    padded_E = (counts_E + block_size - 1) // block_size * block_size
    ends_E = padded_E.cumsum(0)
    shift_E = torch.cat((ends_E - padded_E - starts_E[:-1], starts_E.new_full((1,), num_rows)))
    row_P = (torch.arange(num_pairs, device=device) + shift_E[sorted_P]).clamp(max=num_rows)
    pairs_R = torch.full((num_rows + 1,), num_pairs, dtype=torch.int32, device=device)
    pairs_R[row_P] = order_P.to(torch.int32)
    first_rows_B = torch.arange(0, num_rows, block_size, device=device)
    experts_B = torch.searchsorted(ends_E, first_rows_B, right=True)
    block_experts_B = experts_B.where(experts_B < num_experts, -1).to(torch.int32)
    return pairs_R[:num_rows], block_experts_B, ends_E[-1:].to(torch.int32)


KERNELS = (Kernel(op="moe_align", provider="torch", function=moe_align, verified_on=("cpu", "NVIDIA H100")),)
