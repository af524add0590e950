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
            weights_RV = _scaled(logits_RV, states, plain).softmax(-1)
            for row, token_id in zip(plain, _invert(weights_RV, draws), strict=True):
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


def _scaled(logits_RV: torch.Tensor, states: Sequence[SequenceState], rows: list[int]) -> torch.Tensor:
    """Scores of `rows` over their temperatures, the best one at zero: a tiny temperature cannot overflow."""
    temperature_R1 = _column(states, rows, "temperature", logits_RV)
    rows_RV = logits_RV[rows]
    smallest = torch.finfo(rows_RV.dtype).tiny
    return (rows_RV - rows_RV.amax(-1, keepdim=True)) / temperature_R1.clamp_min(smallest)


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
    scaled_RV = _scaled(logits_RV, states, rows)
    weights_RV = scaled_RV.softmax(-1)
    vocab_size = scaled_RV.shape[-1]
    num_candidates = min(vocab_size, max(FIRST_CANDIDATES, *(states[row].params.top_k + 1 for row in rows)))
    ids_RC = _best(scaled_RV, num_candidates)
    kept_RC, enough = _keep(weights_RV.gather(-1, ids_RC), states, rows, vocab_size)
    if not enough and num_candidates < vocab_size:
        ids_RC = _best(scaled_RV, vocab_size)
        kept_RC, _ = _keep(weights_RV.gather(-1, ids_RC), states, rows, vocab_size)
    chosen = _invert(kept_RC, _uniforms(states, rows, logits_RV.device))
    return ids_RC[torch.arange(len(rows), device=ids_RC.device), chosen].tolist()


def _best(scores_RV: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` best scores, best first, equal scores by id.

    topk alone leaves the order of equal scores open, and rounded scores are often equal: a draw would then depend
    on `count`, which other requests decide.
    """
    if count == scores_RV.shape[-1]:
        return scores_RV.sort(dim=-1, descending=True, stable=True).indices
    ids_RC = scores_RV.topk(count, dim=-1).indices.sort(dim=-1).values
    order_RC = scores_RV.gather(-1, ids_RC).sort(dim=-1, descending=True, stable=True).indices
    return ids_RC.gather(-1, order_RC)


def _keep(
    weights_RC: torch.Tensor, states: Sequence[SequenceState], rows: list[int], vocab_size: int
) -> tuple[torch.Tensor, bool]:
    """Weights of the sorted candidates after top-k, then top-p of what is left, then min-p; zero where cut.

    The second value is False when a row's filters might keep tokens beyond the candidates, or might have kept
    others of equal weight.
    """
    rank_1C = torch.arange(weights_RC.shape[-1], device=weights_RC.device)[None]
    top_k_R1 = _column(states, rows, "top_k", weights_RC)
    top_k_R1 = torch.where(top_k_R1 > 0, top_k_R1, float(vocab_size))
    best_RC = weights_RC * (rank_1C < top_k_R1)
    # Running sums, not sums: they do not change with the number of candidates, which other requests decide.
    sums_RC = best_RC.cumsum(-1, dtype=torch.float64)
    # With top-k on, its tokens are the whole distribution for top-p; otherwise the vocabulary is.
    mass_R1 = torch.where(top_k_R1 < vocab_size, sums_RC[:, -1:], 1.0)
    kept_RC = (best_RC > 0) & (sums_RC - best_RC < _column(states, rows, "top_p", weights_RC) * mass_R1)
    kept_RC &= best_RC >= _column(states, rows, "min_p", weights_RC) * best_RC[:, :1]
    worst_kept_R = best_RC.masked_fill(~kept_RC, torch.inf).amin(-1)
    enough = bool((worst_kept_R > weights_RC[:, -1]).all())
    return best_RC * kept_RC, enough
