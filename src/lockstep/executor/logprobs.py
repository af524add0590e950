"""Log-probabilities of chosen and of prompt tokens, under the model's own distribution.

Shapes: R rows, K best alternatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lockstep.core.step import TokenLogprob
from lockstep.executor.transfers import Transfers

ROWS_AT_ONCE = 128
"""Prompt rows scored together: bounds the memory of [rows, vocabulary] scores."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Log-probabilities on their way to the host: there once the step's event has passed."""

    token_ids_R: torch.Tensor
    chosen_R: torch.Tensor
    best_ids_RK: torch.Tensor | None
    best_RK: torch.Tensor | None
    num_top: Sequence[int]

    def read(self) -> list[TokenLogprob]:
        """One for each row."""
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(self.num_top)
        if self.best_ids_RK is not None and self.best_RK is not None:
            rows = zip(self.best_ids_RK.tolist(), self.best_RK.tolist(), self.num_top, strict=True)
            tops = [tuple(zip(ids[:count], values[:count], strict=True)) for ids, values, count in rows]
        return list(map(TokenLogprob, self.token_ids_R.tolist(), self.chosen_R.tolist(), tops))


def score_tokens(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top: Sequence[int], transfers: Transfers
) -> ScoredTokens:
    """For each row the log-probability of its token and of its `num_top` best ones, best first."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    chosen_R = logprobs_RV.gather(-1, token_ids_R[:, None]).flatten()
    most = max(num_top, default=0)
    best = logprobs_RV.topk(most, dim=-1) if most else None
    down = transfers.download
    return ScoredTokens(
        down(token_ids_R),
        down(chosen_R),
        None if best is None else down(best.indices),
        None if best is None else down(best.values),
        num_top,
    )


def score_prompt(
    hidden_TD: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    next_token_ids_T: torch.Tensor,
    num_top: int,
    transfers: Transfers,
) -> list[ScoredTokens]:
    """Row t of `hidden_TD` scores token t of `next_token_ids_T`; pieces of so many rows, in order."""
    pieces = zip(hidden_TD.split(ROWS_AT_ONCE), next_token_ids_T.split(ROWS_AT_ONCE), strict=True)
    return [
        score_tokens(logits_of(rows_RD), token_ids_R, [num_top] * len(token_ids_R), transfers)
        for rows_RD, token_ids_R in pieces
        if len(token_ids_R)
    ]
