"""One expert after the other, each on the rows that chose it: reads the routing on the host, so no graph can hold it.

Shapes: T tokens, D model, E experts, F inner width, K experts of each token, P = T * K pairs, R rows of one expert.
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel


def fused_moe(
    hidden_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """See the contract."""
    top_k = ids_TK.shape[1]
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    sorted_P, order_P = ids_TK.flatten().sort(stable=True)
    weights_P = weights_TK.flatten()
    experts, counts = torch.unique_consecutive(sorted_P, return_counts=True)
    for expert, pairs_R in zip(experts.tolist(), order_P.split(counts.tolist()), strict=True):
        if expert < 0:
            continue
        tokens_R = pairs_R // top_k
        rows_RD = hidden_TD.index_select(0, tokens_R)
        gate_RF, up_RF = (rows_RD @ gate_up_E2FD[expert].T).chunk(2, dim=-1)
        found_RD = (torch.nn.functional.silu(gate_RF) * up_RF) @ down_EDF[expert].T
        out_TD.index_add_(0, tokens_R, found_RD * weights_P[pairs_R, None])
    return out_TD.to(hidden_TD.dtype)


KERNELS = (
    Kernel(
        op="fused_moe",
        provider="torch",
        function=fused_moe,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
