"""Shapes: T tokens, E experts, G groups of experts, K experts of each token."""

from __future__ import annotations

import torch

SMALLEST_SUM = 1e-20
"""Added to the sum that renormalising divides by, so that scores of zero stay zero."""


def moe_topk_sigmoid(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    renormalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K best experts of each token by sigmoid score, and their weights.

    The choice looks at score + bias. With more than one group of neighbouring experts, the groups with the largest
    sums of their two best experts compete alone. The weights are scores without bias, divided by their sum when
    `renormalise`, times `scale`. Equal values: the lowest id first, of groups too. Weights are float32 [T, K], ids
    int32 [T, K]. Source: DeepSeek-AI, DeepSeek-V3 Technical Report, 2024.
    """
    scores_TE = torch.sigmoid(logits_TE.float())
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if num_groups > 1:
        choice_TGe = choice_TE.unflatten(-1, (num_groups, -1))
        best_two_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(-1)
        groups_TG = torch.sort(best_two_TG, dim=-1, descending=True, stable=True).indices
        is_out_TG = torch.zeros_like(best_two_TG, dtype=torch.bool)
        is_out_TG.scatter_(-1, groups_TG[:, top_k_groups:], True)
        choice_TE = choice_TGe.masked_fill(is_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
    ids_TK = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + SMALLEST_SUM)
    return weights_TK * scale, ids_TK.to(torch.int32)
