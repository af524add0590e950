"""Shapes: T tokens, E experts, K experts of each token."""

from __future__ import annotations

import torch


def moe_topk_softmax(
    logits_TE: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K most likely experts of each token, best first, and their share of a softmax over all experts.

    Experts are chosen by their logits, which softmax leaves in order; of equal ones the lowest id comes first.
    `renormalise` divides the chosen weights by their sum. Weights are float32 [T, K], ids int32 [T, K].
    Source: Shazeer et al., Outrageously Large Neural Networks, 2017; renormalised as in Mixtral, 2024.
    """
    ids_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices
    ids_TK = ids_TE[:, :top_k]
    weights_TK = torch.softmax(logits_TE.float(), dim=-1).gather(-1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, ids_TK.to(torch.int32)
