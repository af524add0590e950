"""The step that is being put together."""

from __future__ import annotations

from lockstep.core.step import PageCopy, SequenceStart, StepPlan, TokenSlice
from lockstep.kv.index.page_index import PageTable
from lockstep.scheduler.sequence import Sequence

MANY = 64
"""From so many single tokens on, not all of their attention begins at once: what takes longest is to begin first."""


class Batch:
    """Slices within a budget of rows, each with its sequence and the page table that it is computed on."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = self.rows_left = num_rows
        self.sequences: list[Sequence] = []
        self._started: list[SequenceStart] = []
        self._slices: list[TokenSlice] = []
        self._must_land = False

    @property
    def tables(self) -> list[PageTable]:
        """The page table of each sequence."""
        return [sequence.table for sequence in self.sequences if sequence.table is not None]

    def start(self, start: SequenceStart) -> None:
        self._started.append(start)

    def add_next(self, sequence: Sequence) -> bool:
        """`add` for the many that only go on after their prompt: one token is owed, has its slot, and may be followed.

        False, and nothing changed, for a running sequence of which more is to be decided.
        """
        start = sequence.num_computed
        end = start + 1
        table = sequence.table
        assert table is not None
        if (
            end != sequence.num_tokens
            or end > table.num_slots
            or end >= sequence.max_tokens
            or not sequence.is_plain
            or sequence.prefilling
        ):
            return False
        sequence.num_computed = end
        sequence.num_tokens = end + 1
        self._slices.append(TokenSlice(sequence.seq_id, start, 1, (), True))
        self.sequences.append(sequence)
        self.rows_left -= 1
        return True

    def add(self, sequence: Sequence, num_rows: int, new_page_ids: tuple[int, ...]) -> None:
        """Computes the next `num_rows` owed tokens of a running sequence; from now on they count as computed."""
        start = sequence.num_computed
        end = sequence.num_computed = start + num_rows
        samples = not sequence.embeds and end == sequence.num_tokens
        if samples:
            sequence.num_tokens += 1
            self._must_land |= sequence.must_land
        self._slices.append(TokenSlice(sequence.seq_id, start, num_rows, new_page_ids, samples))
        self.sequences.append(sequence)
        self.rows_left -= num_rows

    def longest_first(self) -> None:
        """Many single tokens in the order of what each attends to: when the last begin, little is left to be done."""
        if len(self._slices) < MANY or len(self._slices) != self._num_rows - self.rows_left:
            return
        starts = [piece.start for piece in self._slices]
        order = sorted(range(len(starts)), key=starts.__getitem__, reverse=True)
        self._slices = [self._slices[at] for at in order]
        self.sequences = [self.sequences[at] for at in order]

    def plan(self, step_id: int, ended: tuple[int, ...], page_copies: tuple[PageCopy, ...]) -> StepPlan:
        return StepPlan(step_id, tuple(self._started), ended, tuple(self._slices), self._must_land, page_copies)
