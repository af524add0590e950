"""What the executor knows of each running sequence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from lockstep.core.request import Pooling
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan


@dataclass
class SequenceState:
    """Token ids (prompt and generated), pages, and what sampling has to remember."""

    seq_id: int
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    page_ids: list[int]
    pooling: Pooling | None
    generated_counts: Counter[int]
    hidden_sum_D: torch.Tensor | None = None
    error: str | None = None

    @classmethod
    def begin(cls, start: SequenceStart) -> SequenceState:
        """A sequence as it enters, for the first time or after a preemption."""
        return cls(
            seq_id=start.seq_id,
            params=start.params,
            token_ids=list(start.token_ids),
            num_prompt_tokens=start.num_prompt_tokens,
            page_ids=list(start.page_ids),
            pooling=start.pooling,
            generated_counts=Counter(start.token_ids[start.num_prompt_tokens :]),
        )

    @property
    def num_generated_tokens(self) -> int:
        """Tokens beyond the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """A new token was chosen."""
        self.token_ids.append(token_id)
        self.generated_counts[token_id] += 1


class SequenceTable:
    """Every running sequence by id; follows the plans and nothing else."""

    def __init__(self) -> None:
        self._states: dict[int, SequenceState] = {}

    def __getitem__(self, seq_id: int) -> SequenceState:
        return self._states[seq_id]

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, plan: StepPlan) -> None:
        """Drop what ended, add what started, append new pages."""
        for seq_id in plan.ended:
            self._states.pop(seq_id, None)
        for start in plan.started:
            self._states[start.seq_id] = SequenceState.begin(start)
        for piece in plan.slices:
            self._states[piece.seq_id].page_ids.extend(piece.new_page_ids)
