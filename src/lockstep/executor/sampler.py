"""Chooses the next token of each row.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.executor.draws import uniform
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.sequences import SequenceState
from lockstep.ops.top_k_top_p_sample.kernels.torch import top_k_top_p_sample

Sample = Callable[..., torch.Tensor]
"""A kernel of the operator top_k_top_p_sample."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's token, or why there is none."""

    token_id: int
    error: str | None = None


class Sampler:
    """Penalties, bias, bans, hooks, then greedy or seeded choice, per row and whatever shares the batch.

    `eos_token_ids` are banned, like a request's stop ids, until its `min_tokens` are reached. `sample` is the kernel
    that is bound for the draws.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        hooks: Sequence[SamplerHook] = (),
        sample: Sample = top_k_top_p_sample,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._hooks = tuple(hooks)
        self._sample = sample

    def choose(self, logits_RV: torch.Tensor, states: Sequence[SequenceState]) -> list[Choice]:
        """One choice a row. May overwrite `logits_RV` (float32)."""
        seq_ids = [state.seq_id for state in states]
        for row, state in enumerate(states):
            if _changes_logits(state, self._eos_token_ids):
                self._edit(logits_RV[row], state)
        for hook in self._hooks:
            if hook.active(seq_ids):
                hook.mask(seq_ids, logits_RV)
        best_values, token_ids = _likeliest(logits_RV)
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
        drawing = [states[row] for row in rows]
        device = logits_RV.device
        drawn_R = self._sample(
            logits_RV if len(rows) == len(states) else logits_RV[rows],
            _column(drawing, "temperature", torch.float32, device),
            _column(drawing, "top_k", torch.int64, device),
            _column(drawing, "top_p", torch.float32, device),
            _column(drawing, "min_p", torch.float32, device),
            _uniforms(drawing, device),
        )
        for row, token_id in zip(rows, drawn_R.tolist(), strict=True):
            token_ids[row] = token_id


def _likeliest(logits_RV: torch.Tensor) -> tuple[list[float], list[int]]:
    """The largest score of each row and where it is: the first of equals, or NaN where there is one."""
    if not logits_RV.is_cpu:
        best = logits_RV.max(dim=-1)
        return best.values.tolist(), best.indices.tolist()
    # numpy finds it about ten times sooner than torch does.
    scores_RV = logits_RV.numpy()
    at_R = scores_RV.argmax(axis=-1)
    return scores_RV[np.arange(len(at_R)), at_R].tolist(), at_R.tolist()


def _changes_logits(state: SequenceState, eos_token_ids: tuple[int, ...]) -> bool:
    params = state.params
    banned = state.num_generated_tokens < params.min_tokens and (eos_token_ids or params.stop_token_ids)
    return bool(params.has_penalties or params.logit_bias or banned)


def _explain(value: float) -> str:
    if value == float("-inf"):
        return "no token is allowed here: the constraints on this request contradict each other"
    return "the model's scores are not numbers (NaN or infinite); check the weights and --dtype"


def _column(
    states: Sequence[SequenceState], name: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.tensor([getattr(state.params, name) for state in states], dtype=dtype, device=device)


def _uniforms(states: Sequence[SequenceState], device: torch.device) -> torch.Tensor:
    draws = [uniform(state.params.seed or 0, len(state.token_ids)) for state in states]
    return torch.tensor(draws, dtype=torch.float64, device=device)
