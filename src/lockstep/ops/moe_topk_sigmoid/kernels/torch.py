"""Two selections over keys that hold value and id.

Shapes: T tokens, E experts, G groups of experts, K experts of each token.
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.moe_topk_sigmoid.reference import SMALLEST_SUM
from lockstep.ops.moe_topk_softmax.kernels.torch import first_of_largest


def moe_topk_sigmoid(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    renormalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    scores_TE = torch.sigmoid(logits_TE.float())
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if num_groups > 1:
        choice_TGe = choice_TE.unflatten(-1, (num_groups, -1))
        best_two_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(-1)
        stays_TG = torch.zeros_like(best_two_TG, dtype=torch.bool)
        stays_TG.scatter_(-1, first_of_largest(best_two_TG, top_k_groups), True)
        choice_TE = choice_TGe.masked_fill(~stays_TG.unsqueeze(-1), float("-inf")).flatten(1)
    ids_TK = first_of_largest(choice_TE, top_k)
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalise:
        weights_TK = weights_TK * (scale / (weights_TK.sum(-1, keepdim=True) + SMALLEST_SUM))
    else:
        weights_TK = weights_TK * scale
    return weights_TK, ids_TK.to(torch.int32)


KERNELS = (
    Kernel(
        op="moe_topk_sigmoid", provider="torch", function=moe_topk_sigmoid, verified_on=("cpu", "NVIDIA H100")
    ),
)
