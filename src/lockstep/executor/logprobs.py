"""Log-probabilities of chosen and of prompt tokens, under the model's own distribution.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lockstep.core.step import TokenLogprob

ROWS_AT_ONCE = 128
"""Prompt rows scored together: bounds the memory of [rows, vocabulary] scores."""


def token_logprobs(
    logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> tuple[TokenLogprob, ...]:
    """For each row the log-probability of its token and of its `num_top` best ones, best first."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    index_R1 = torch.tensor(token_ids, device=logits_RV.device).unsqueeze(-1)
    chosen = logprobs_RV.gather(-1, index_R1).flatten().tolist()
    most = max(num_top, default=0)
    best = logprobs_RV.topk(most, dim=-1) if most else None
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if best is not None:
        rows = zip(best.indices.tolist(), best.values.tolist(), num_top, strict=True)
        tops = [tuple(zip(ids[:count], values[:count], strict=True)) for ids, values, count in rows]
    return tuple(
        TokenLogprob(token_id, logprob, top)
        for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True)
    )


def prompt_logprobs(
    hidden_TD: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    next_token_ids: Sequence[int],
    num_top: int,
) -> list[TokenLogprob]:
    """Row t of `hidden_TD` scores `next_token_ids[t]`."""
    found: list[TokenLogprob] = []
    for start in range(0, len(next_token_ids), ROWS_AT_ONCE):
        token_ids = next_token_ids[start : start + ROWS_AT_ONCE]
        logits_RV = logits_of(hidden_TD[start : start + len(token_ids)])
        found.extend(token_logprobs(logits_RV, token_ids, [num_top] * len(token_ids)))
    return found
