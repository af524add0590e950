"""What requests change about the scores: penalties, biases and bans, applied where the scores are.

Shapes: R rows, V vocabulary, E edited scores, P rows with penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart
from lockstep.executor.transfers import Transfers

ROWS_AT_ONCE = 32
"""Rows with penalties computed together: bounds the memory of their scores."""

_IN_PROMPT = 1 << 30
"""Added to the count of a token that the prompt has."""


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What one sequence wants changed. Its `banned_ids` come back from `banned_until`, a position, on."""

    params: SamplingParams
    banned_until: int
    banned_ids: np.ndarray
    bias_ids: np.ndarray
    biases: np.ndarray
    tally: int | None


class ScoreEdits:
    """The edits of running sequences, by slot. Only what a request asks for takes memory or time.

    In this order: the repetition penalty divides positive scores and multiplies others, for tokens of the prompt and
    generated ones; presence and frequency penalties count generated ones; then come biases; until `min_tokens` are
    there, `eos_token_ids` and the request's stop ids are out.
    """

    def __init__(self, max_sequences: int, eos_token_ids: Sequence[int], transfers: Transfers) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._transfers = transfers
        self._tallies = TokenTallies(transfers)
        self._wishes: dict[int, _Wishes] = {}
        self._edited_until_S = np.zeros(max_sequences + 1, dtype=np.int64)
        """Positions from which on a sequence's scores stay as they are."""

    def start(self, slot: int, start: SequenceStart, vocab_size: int) -> None:
        """A sequence enters in this slot, for the first time or after a preemption."""
        params = start.params
        banned = self._eos_token_ids + params.stop_token_ids if params.min_tokens else ()
        banned_until = start.num_prompt_tokens + params.min_tokens if banned else 0
        lasting = params.has_penalties or bool(params.logit_bias)
        self._edited_until_S[slot] = np.iinfo(np.int64).max if lasting else banned_until
        if not self._edited_until_S[slot]:
            return
        self._wishes[slot] = _Wishes(
            params,
            banned_until,
            np.array([token_id for token_id in banned if token_id < vocab_size], dtype=np.int64),
            np.array(list(params.logit_bias), dtype=np.int64),
            np.array(list(params.logit_bias.values()), dtype=np.float32),
            self._tallies.begin(start, vocab_size) if params.has_penalties else None,
        )

    def end(self, slot: int) -> None:
        """The sequence of this slot left."""
        self._edited_until_S[slot] = 0
        wishes = self._wishes.pop(slot, None)
        if wishes is not None and wishes.tally is not None:
            self._tallies.end(wishes.tally)

    def edited_until(self, slot: int) -> int:
        """The position from which on the scores of the sequence of this slot stay as they are."""
        return int(self._edited_until_S[slot])

    def any(self, slot_R: np.ndarray, position_R: np.ndarray) -> bool:
        """True when `apply` would change the scores of one of these."""
        return bool((position_R < self._edited_until_S[slot_R]).any())

    def apply(self, logits_RV: torch.Tensor, slot_R: np.ndarray, position_R: np.ndarray) -> None:
        """Edits the scores of the tokens at these positions of these sequences, in place."""
        rows = np.nonzero(position_R < self._edited_until_S[slot_R])[0].tolist()
        if not rows:
            return
        edited = [(row, self._wishes[slot_R[row]]) for row in rows]
        penalised = [(row, wishes) for row, wishes in edited if wishes.tally is not None]
        for first in range(0, len(penalised), ROWS_AT_ONCE):
            self._penalise(logits_RV, penalised[first : first + ROWS_AT_ONCE])
        biased = [(row, wishes.bias_ids, wishes.biases) for row, wishes in edited if len(wishes.bias_ids)]
        if biased:
            where = self._places([(row, ids) for row, ids, _ in biased])
            biases_E = self._transfers.upload(np.concatenate([biases for _, _, biases in biased]))
            logits_RV.index_put_(where, biases_E, accumulate=True)
        banned = [(row, wishes.banned_ids) for row, wishes in edited if position_R[row] < wishes.banned_until]
        if banned:
            # A plain number would be copied to the device, which waits for it.
            logits_RV.index_put_(self._places(banned), logits_RV.new_full((), float("-inf")))

    def count(self, slot_R: np.ndarray, token_ids_R: torch.Tensor) -> None:
        """These sequences sampled these tokens."""
        tallied = [
            (row, wishes.tally)
            for row, slot in enumerate(slot_R.tolist() if self._wishes else ())
            if (wishes := self._wishes.get(slot)) is not None and wishes.tally is not None
        ]
        if tallied:
            row_P, tally_P = self._transfers.upload(np.array(tallied, dtype=np.int64).T)
            self._tallies.count(tally_P, token_ids_R.index_select(0, row_P))

    def _penalise(self, logits_RV: torch.Tensor, penalised: Sequence[tuple[int, _Wishes]]) -> None:
        where = np.array([(row, wishes.tally) for row, wishes in penalised], dtype=np.int64)
        row_P, tally_P = self._transfers.upload(where.T)
        asked = [
            (wishes.params.repetition_penalty, wishes.params.presence_penalty, wishes.params.frequency_penalty)
            for _, wishes in penalised
        ]
        repetition_P1, presence_P1, frequency_P1 = self._transfers.upload(
            np.array(asked, dtype=np.float32).T[:, :, None]
        )
        tallies_PV = self._tallies.of(tally_P)
        generated_PV = tallies_PV & (_IN_PROMPT - 1)
        scores_PV = logits_RV.index_select(0, row_P)
        repeated_PV = torch.where(scores_PV > 0, scores_PV / repetition_P1, scores_PV * repetition_P1)
        scores_PV = torch.where(tallies_PV > 0, repeated_PV, scores_PV)
        penalty_PV = presence_P1 + frequency_P1 * generated_PV
        scores_PV = torch.where(generated_PV > 0, scores_PV - penalty_PV, scores_PV)
        logits_RV.index_copy_(0, row_P, scores_PV)

    def _places(self, ids_of_rows: Sequence[tuple[int, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and token id of each score, for indexing [R, V]."""
        row_E = np.concatenate([np.full(len(ids), row) for row, ids in ids_of_rows])
        id_E = np.concatenate([ids for _, ids in ids_of_rows])
        rows_E, ids_E = self._transfers.upload(np.stack((row_E, id_E)))
        return rows_E, ids_E


class TokenTallies:
    """How often each token occurs in a sequence, on the device, for those who ask: int32, a row each.

    A row has the number of times that a token was generated, and _IN_PROMPT more where the prompt has it.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._counts: torch.Tensor | None = None
        self._free: list[int] = []

    def begin(self, start: SequenceStart, vocab_size: int) -> int:
        """A row for the tokens that are known of a sequence. The table doubles when none is free."""
        if not self._free or self._counts is None:
            self._grow(vocab_size)
        assert self._counts is not None
        row = self._free.pop()
        counts_V = self._counts[row]
        counts_V.zero_()
        token_ids = np.array(start.token_ids, dtype=np.int64)
        prompt, generated = np.split(token_ids, [start.num_prompt_tokens])
        known, times = np.unique(generated, return_counts=True)
        counts_V[self._transfers.upload(known)] = self._transfers.upload(times.astype(np.int32))
        in_prompt = self._transfers.upload(np.unique(prompt))
        counts_V[in_prompt] = counts_V[in_prompt] + _IN_PROMPT
        return row

    def end(self, row: int) -> None:
        """The row is free."""
        self._free.append(row)

    def of(self, rows_P: torch.Tensor) -> torch.Tensor:
        """Rows [P, V]."""
        assert self._counts is not None
        return self._counts.index_select(0, rows_P)

    def count(self, rows_P: torch.Tensor, token_ids_P: torch.Tensor) -> None:
        """One more of these tokens, each in its row."""
        assert self._counts is not None
        one = torch.ones_like(token_ids_P, dtype=torch.int32)
        self._counts.index_put_((rows_P, token_ids_P), one, accumulate=True)

    def _grow(self, vocab_size: int) -> None:
        held = 0 if self._counts is None else len(self._counts)
        fresh = torch.zeros((max(1, held), vocab_size), dtype=torch.int32, device=self._transfers.device)
        self._counts = fresh if self._counts is None else torch.cat((self._counts, fresh))
        self._free += range(len(self._counts) - 1, held - 1, -1)
