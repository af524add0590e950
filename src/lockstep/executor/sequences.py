"""What the executor knows of each running sequence.

Shapes: S slots, P pages of the longest sequence. A running sequence has a slot from 1 on; slot 0 is nobody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.core.request import Pooling
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice

NOBODY = 0
"""The slot of padding."""


@dataclass(slots=True)
class SequenceState:
    """One sequence since it entered. `token_ids` (int64) are those that were known then: what was sampled since is
    on the device."""

    seq_id: int
    slot: int
    params: SamplingParams
    token_ids: np.ndarray
    num_prompt_tokens: int
    pooling: Pooling | None
    hidden_sum_D: torch.Tensor | None = None
    error: str | None = None


class SequenceTable:
    """Every running sequence by id, and what a step reads of many as arrays by slot; follows the plans alone.

    `num_known_S` counts the tokens whose ids the host has, `page_ids_SP` holds the page tables. `is_special_S` marks
    sequences of which more is asked than their next token, `is_scored_S` those whose next tokens are.
    """

    def __init__(self, max_sequences: int) -> None:
        self._states: dict[int, SequenceState] = {}
        self._slots: dict[int, int] = {}
        self._free_slots = list(range(max_sequences, NOBODY, -1))
        self._num_pages_S = [0] * (max_sequences + 1)
        self.num_known_S = np.zeros(max_sequences + 1, dtype=np.int64)
        self.is_special_S = np.zeros(max_sequences + 1, dtype=bool)
        self.is_scored_S = np.zeros(max_sequences + 1, dtype=bool)
        self.page_ids_SP = np.zeros((max_sequences + 1, 64), dtype=np.int32)

    def __getitem__(self, seq_id: int) -> SequenceState:
        return self._states[seq_id]

    def __len__(self) -> int:
        return len(self._states)

    def slots(self, slices: Sequence[TokenSlice]) -> np.ndarray:
        """The slot of each slice's sequence."""
        slots = self._slots
        return np.array([slots[piece.seq_id] for piece in slices], dtype=np.int64)

    def apply(self, plan: StepPlan) -> list[int]:
        """Drops what ended, adds what started, appends new pages. Gives the slots that were let go."""
        left = [self._slots.pop(seq_id) for seq_id in plan.ended if self._states.pop(seq_id, None) is not None]
        self._free_slots += left
        for start in plan.started:
            self._begin(start)
        for piece in plan.slices:
            if piece.new_page_ids:
                self._append_pages(self._slots[piece.seq_id], piece.new_page_ids)
        return left

    def fail(self, seq_id: int, error: str) -> None:
        """Nothing more comes of this sequence but the message."""
        state = self._states[seq_id]
        state.error = error
        self.is_special_S[state.slot] = True

    def _begin(self, start: SequenceStart) -> None:
        slot = self._slots[start.seq_id] = self._free_slots.pop()
        self._states[start.seq_id] = SequenceState(
            start.seq_id,
            slot,
            start.params,
            np.array(start.token_ids, dtype=np.int64),
            start.num_prompt_tokens,
            start.pooling,
        )
        self.num_known_S[slot] = len(start.token_ids)
        self.is_special_S[slot] = start.pooling is not None or start.params.prompt_logprobs is not None
        self.is_scored_S[slot] = start.params.logprobs is not None
        self._num_pages_S[slot] = 0
        self._append_pages(slot, start.page_ids)

    def _append_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        first = self._num_pages_S[slot]
        end = self._num_pages_S[slot] = first + len(page_ids)
        if end > self.page_ids_SP.shape[1]:
            grown_SP = np.zeros((len(self.page_ids_SP), 2 * end), dtype=np.int32)
            grown_SP[:, : self.page_ids_SP.shape[1]] = self.page_ids_SP
            self.page_ids_SP = grown_SP
        self.page_ids_SP[slot, first:end] = page_ids
