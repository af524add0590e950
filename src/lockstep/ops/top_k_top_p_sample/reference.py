"""Shapes: R rows, V vocabulary, C candidates (sorted, best first)."""

from __future__ import annotations

import torch


def top_k_top_p_sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    draw_R: torch.Tensor,
) -> torch.Tensor:
    """The token id, int64 [R], in whose share of a row's weights the row's draw falls.

    Weights are softmax(logits / temperature). Filters leave: of all tokens, best first and equals by id, the first
    top_k (below 1: all); of these, each that the better ones together leave below top_p of their weight; of these,
    each of at least min_p times the best one's weight. A draw in [0, 1) picks the first token with which the running
    sum of what is left passes draw * total: in the order of ids where no filter is on, else best first.
    Sources: Fan et al., Hierarchical Neural Story Generation, 2018 (top-k); Holtzman et al., The Curious Case of
    Neural Text Degeneration, 2020 (top-p); Nguyen et al., Turning Up the Heat, 2024 (min-p).
    """
    scores_RV = scores_of(logits_RV, temperature_R)
    weights_RV = scores_RV.softmax(-1)
    order_RV = scores_RV.sort(dim=-1, descending=True, stable=True).indices
    kept_RV = kept_weights(weights_RV.gather(-1, order_RV), top_k_R, top_p_R, min_p_R, logits_RV.shape[-1])
    best_first_R1 = order_RV.gather(-1, invert(kept_RV, draw_R)[:, None])
    by_id_R1 = invert(weights_RV, draw_R)[:, None]
    return torch.where(has_filter(top_k_R, top_p_R, min_p_R)[:, None], best_first_R1, by_id_R1).flatten()


def has_filter(top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor) -> torch.Tensor:
    """True [R] where a row's filters may drop a token."""
    return (top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)


def scores_of(logits_RV: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """Logits over temperatures, float32, the best one at zero: a tiny temperature cannot overflow."""
    logits_RV = logits_RV.float()
    smallest = torch.finfo(torch.float32).tiny
    return (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R[:, None].clamp_min(smallest)


def kept_weights(
    weights_RC: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Weights of sorted candidates after top-k, then top-p of what is left, then min-p; zero where cut."""
    rank_1C = torch.arange(weights_RC.shape[-1], device=weights_RC.device)[None]
    top_k_R1 = torch.where(top_k_R > 0, top_k_R, vocab_size)[:, None]
    best_RC = weights_RC * (rank_1C < top_k_R1)
    # Running sums, not sums: they do not change with the number of candidates, which other rows decide.
    sums_RC = best_RC.cumsum(-1, dtype=torch.float64)
    # With top-k on, its tokens are the whole distribution for top-p; otherwise the vocabulary is.
    mass_R1 = torch.where(top_k_R1 < vocab_size, sums_RC[:, -1:], 1.0)
    kept_RC = (best_RC > 0) & (sums_RC - best_RC < top_p_R[:, None] * mass_R1)
    kept_RC &= best_RC >= min_p_R[:, None] * best_RC[:, :1]
    return best_RC * kept_RC


def invert(weights_RC: torch.Tensor, draw_R: torch.Tensor) -> torch.Tensor:
    """For each row the first entry, int64 [R], whose running sum of weights passes draw * total; sums in float64."""
    sums_RC = weights_RC.cumsum(-1, dtype=torch.float64)
    targets_R1 = draw_R[:, None] * sums_RC[:, -1:]
    # right=True: a draw that equals a running sum belongs to the next entry, so weight 0 is never chosen.
    index_R1 = torch.searchsorted(sums_RC, targets_R1, right=True)
    return index_R1.clamp(max=weights_RC.shape[-1] - 1).flatten()
