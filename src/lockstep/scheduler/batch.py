"""The step that is being put together."""

from __future__ import annotations

from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.scheduler.sequence import Sequence


class Batch:
    """Slices within a budget of rows, each with its sequence."""

    def __init__(self, num_rows: int) -> None:
        self.rows_left = num_rows
        self.sequences: list[Sequence] = []
        self._started: list[SequenceStart] = []
        self._slices: list[TokenSlice] = []

    def start(self, start: SequenceStart) -> None:
        self._started.append(start)

    def add(self, sequence: Sequence, num_rows: int, new_page_ids: tuple[int, ...]) -> None:
        """Computes the next `num_rows` owed tokens of the sequence."""
        start = sequence.num_computed
        samples = start + num_rows == len(sequence.token_ids) and sequence.group.request.pooling is None
        self._slices.append(TokenSlice(sequence.seq_id, start, num_rows, new_page_ids, samples))
        self.sequences.append(sequence)
        self.rows_left -= num_rows

    def plan(self, step_id: int, ended: tuple[int, ...]) -> StepPlan:
        return StepPlan(step_id, tuple(self._started), ended, tuple(self._slices))
