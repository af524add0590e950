"""Chooses the next token of each row.

Shapes: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.core.sampling import SamplingParams
from lockstep.executor.draws import uniform
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.sequences import SequenceState

FIRST_CANDIDATES = 256
"""Tokens sorted at first for top-k and top-p; the whole vocabulary is sorted only when these are not enough."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's token, or why there is none."""

    token_id: int
    error: str | None = None


class Sampler:
    """Penalties, bias, bans, hooks, then greedy or seeded choice, per row and whatever shares the batch.

    `eos_token_ids` are banned, like a request's stop ids, until its `min_tokens` are reached.
    """

    def __init__(self, eos_token_ids: Sequence[int], hooks: Sequence[SamplerHook] = ()) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._hooks = tuple(hooks)

    def choose(self, logits_RV: torch.Tensor, states: Sequence[SequenceState]) -> list[Choice]:
        """One choice a row. May overwrite `logits_RV` (float32)."""
        seq_ids = [state.seq_id for state in states]
        for row, state in enumerate(states):
            if _changes_logits(state, self._eos_token_ids):
                self._edit(logits_RV[row], state)
        for hook in self._hooks:
            if hook.active(seq_ids):
                hook.mask(seq_ids, logits_RV)
        best = logits_RV.max(dim=-1)
        best_values, token_ids = best.values.tolist(), best.indices.tolist()
        random_rows = [row for row, state in enumerate(states) if not state.params.greedy]
        if random_rows:
            self._draw(logits_RV, states, random_rows, token_ids)
        return [
            Choice(token_id) if value - value == 0 else Choice(token_id, _explain(value))
            for token_id, value in zip(token_ids, best_values, strict=True)
        ]

    def _edit(self, logits_V: torch.Tensor, state: SequenceState) -> None:
        params = state.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(state.token_ids)), device=logits_V.device)
            values = logits_V[seen]
            logits_V[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if (params.presence_penalty or params.frequency_penalty) and state.generated_counts:
            ids = torch.tensor(list(state.generated_counts), device=logits_V.device)
            counts = torch.tensor(list(state.generated_counts.values()), device=logits_V.device)
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
        if state.num_generated_tokens < params.min_tokens:
            banned = [
                token_id
                for token_id in (*self._eos_token_ids, *params.stop_token_ids)
                if token_id < len(logits_V)
            ]
            logits_V[banned] = float("-inf")

    def _draw(
        self, logits_RV: torch.Tensor, states: Sequence[SequenceState], rows: list[int], token_ids: list[int]
    ) -> None:
        """Replaces the greedy choice of `rows` by a seeded draw."""
        plain = [row for row in rows if not _filters(states[row].params)]
        filtered = [row for row in rows if _filters(states[row].params)]
        if plain:
            draws = _uniforms(states, plain, logits_RV.device)
            scaled = logits_RV[plain] / _column(states, plain, "temperature", logits_RV)
            for row, token_id in zip(plain, _invert(scaled.softmax(-1), draws), strict=True):
                token_ids[row] = token_id
        if filtered:
            for row, token_id in zip(filtered, _draw_filtered(logits_RV, states, filtered), strict=True):
                token_ids[row] = token_id


def _changes_logits(state: SequenceState, eos_token_ids: tuple[int, ...]) -> bool:
    params = state.params
    banned = state.num_generated_tokens < params.min_tokens and (eos_token_ids or params.stop_token_ids)
    return bool(params.has_penalties or params.logit_bias or banned)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _explain(value: float) -> str:
    if value == float("-inf"):
        return "no token is allowed here: the constraints on this request contradict each other"
    return "the model's scores are not numbers (NaN or infinite); check the weights and --dtype"


def _column(states: Sequence[SequenceState], rows: list[int], name: str, like: torch.Tensor) -> torch.Tensor:
    values = [[float(getattr(states[row].params, name))] for row in rows]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _uniforms(states: Sequence[SequenceState], rows: list[int], device: torch.device) -> torch.Tensor:
    draws = [[uniform(states[row].params.seed or 0, len(states[row].token_ids))] for row in rows]
    return torch.tensor(draws, dtype=torch.float64, device=device)


def _invert(weights_RV: torch.Tensor, draws_R1: torch.Tensor) -> list[int]:
    """For each row the first entry whose running sum of weights passes draw * total; sums in float64."""
    sums_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    targets_R1 = draws_R1 * sums_RV[:, -1:]
    # right=True: a draw that equals a running sum belongs to the next entry, so weight 0 is never chosen.
    index_R1 = torch.searchsorted(sums_RV, targets_R1, right=True)
    return index_R1.clamp_(max=weights_RV.shape[-1] - 1).flatten().tolist()


def _draw_filtered(logits_RV: torch.Tensor, states: Sequence[SequenceState], rows: list[int]) -> list[int]:
    """Draws among the best tokens, sorted: enough of them for every filter, or the whole vocabulary."""
    scaled_RV = logits_RV[rows] / _column(states, rows, "temperature", logits_RV)
    draws_R1 = _uniforms(states, rows, logits_RV.device)
    log_total_R1 = scaled_RV.logsumexp(-1, keepdim=True)
    vocab_size = scaled_RV.shape[-1]
    num_candidates = min(vocab_size, max(FIRST_CANDIDATES, *(_wanted(states[row].params) for row in rows)))
    while True:
        best_RC, ids_RC = scaled_RV.topk(num_candidates, dim=-1)
        weights_RC, enough = _keep(best_RC, log_total_R1, states, rows, vocab_size)
        if enough or num_candidates == vocab_size:
            break
        num_candidates = vocab_size
    chosen = _invert(weights_RC, draws_R1)
    return ids_RC[torch.arange(len(rows), device=ids_RC.device), chosen].tolist()


def _wanted(params: SamplingParams) -> int:
    return params.top_k if params.top_k > 0 else 0


def _keep(
    best_RC: torch.Tensor,
    log_total_R1: torch.Tensor,
    states: Sequence[SequenceState],
    rows: list[int],
    vocab_size: int,
) -> tuple[torch.Tensor, bool]:
    """Weights of the sorted candidates after top-k, then top-p of what is left, then min-p; zero where cut.

    The second value is False when a row's filters might keep tokens beyond the candidates.
    """
    num_candidates = best_RC.shape[-1]
    rank_1C = torch.arange(num_candidates, device=best_RC.device)[None]
    top_k_R1 = _column(states, rows, "top_k", best_RC)
    top_k_R1 = torch.where(top_k_R1 > 0, top_k_R1, float(vocab_size))
    weights_RC = (best_RC - log_total_R1).exp()
    in_top_k_RC = rank_1C < top_k_R1
    weights_RC = weights_RC * in_top_k_RC
    # With top-k on, its tokens are the whole distribution for top-p; otherwise the vocabulary is.
    cut_RC = in_top_k_RC.all(-1, keepdim=True)
    mass_R1 = torch.where(cut_RC & (top_k_R1 > num_candidates), 1.0, weights_RC.sum(-1, keepdim=True))
    top_p_R1 = _column(states, rows, "top_p", best_RC)
    before_RC = weights_RC.cumsum(-1) - weights_RC
    kept_RC = in_top_k_RC & (before_RC < top_p_R1 * mass_R1)
    kept_RC &= weights_RC >= _column(states, rows, "min_p", best_RC) * weights_RC[:, :1]
    # The last candidate survived every filter, so tokens beyond it may too.
    enough = not bool((kept_RC[:, -1:] & (top_k_R1 > num_candidates)).any())
    return weights_RC * kept_RC, enough
