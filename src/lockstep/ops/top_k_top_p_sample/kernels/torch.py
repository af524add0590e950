"""Sorts a few candidates instead of the whole vocabulary, and only for rows that have filters.

Shapes: R rows, V vocabulary, C candidates (sorted, best first).
"""

from __future__ import annotations

import torch

from lockstep.ops.contract import Kernel
from lockstep.ops.top_k_top_p_sample.reference import has_filter, invert, kept_weights, scores_of

FIRST_CANDIDATES = 256
"""Tokens sorted at first; the whole vocabulary is sorted only when these are not enough for some row."""


def top_k_top_p_sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """See the contract. What the filters leave is looked at on the host: a graph cannot hold this kernel."""
    scores_RV = scores_of(logits_RV, temperature_R)
    weights_RV = scores_RV.softmax(-1)
    rows = has_filter(top_k_R, top_p_R, min_p_R).nonzero().flatten()
    if len(rows) == len(draw_R):
        return _draw_filtered(scores_RV, weights_RV, top_k_R, top_p_R, min_p_R, draw_R)
    token_ids_R = invert(weights_RV, draw_R)
    if len(rows):
        limits = (each[rows] for each in (top_k_R, top_p_R, min_p_R, draw_R))
        token_ids_R[rows] = _draw_filtered(scores_RV[rows], weights_RV[rows], *limits)
    return token_ids_R


def sample_unfiltered(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """The operator for rows that are known to have no filter: nothing is looked at on the host."""
    return invert(scores_of(logits_RV, temperature_R).softmax(-1), draw_R)


def _draw_filtered(
    scores_RV: torch.Tensor,
    weights_RV: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """Draws among the best tokens, sorted: enough of them for every filter, or the whole vocabulary."""
    vocab_size = scores_RV.shape[-1]
    wanted = max(FIRST_CANDIDATES, int(top_k_R.max()) + 1) if len(draw_R) else 1
    for num_candidates in (min(wanted, vocab_size), vocab_size):
        ids_RC = _best(scores_RV, num_candidates)
        sorted_RC = weights_RV.gather(-1, ids_RC)
        kept_RC = kept_weights(sorted_RC, top_k_R, top_p_R, min_p_R, vocab_size)
        if num_candidates == vocab_size or _enough(kept_RC, sorted_RC):
            break
    return ids_RC.gather(-1, invert(kept_RC, draw_R)[:, None]).flatten()


def _best(scores_RV: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` best scores, best first, equal scores by id.

    topk alone leaves the order of equal scores open, and rounded scores are often equal: a draw would then depend
    on `count`, which other rows decide.
    """
    if count == scores_RV.shape[-1]:
        return scores_RV.sort(dim=-1, descending=True, stable=True).indices
    ids_RC = scores_RV.topk(count, dim=-1).indices.sort(dim=-1).values
    order_RC = scores_RV.gather(-1, ids_RC).sort(dim=-1, descending=True, stable=True).indices
    return ids_RC.gather(-1, order_RC)


def _enough(kept_RC: torch.Tensor, sorted_RC: torch.Tensor) -> bool:
    """False when a row's filters might keep tokens beyond the candidates, or might have kept others of equal weight."""
    worst_kept_R = kept_RC.masked_fill(kept_RC == 0, torch.inf).amin(-1)
    return bool((worst_kept_R > sorted_RC[:, -1]).all())


KERNELS = (
    Kernel(
        op="top_k_top_p_sample",
        provider="torch",
        function=top_k_top_p_sample,
        verified_on=("cpu", "NVIDIA H100"),
        asks_host=True,
    ),
)
