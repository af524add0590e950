"""Sequences in the order of their rank: the queue, and the running ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter

from lockstep.core.errors import IntegrityError
from lockstep.scheduler.sequence import Sequence

_rank = attrgetter("rank")


class Ranked:
    """A sorted list of sequences. A rank must not change while its sequence is in here."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, position: int) -> Sequence:
        """0 is the best, -1 the worst."""
        return self._sequences[position]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Raises IntegrityError when the sequence is not in here."""
        position = bisect_left(self._sequences, sequence.rank, key=_rank)
        if position == len(self) or self._sequences[position] is not sequence:
            raise IntegrityError(f"sequence {sequence.seq_id} is not among the {self._name}")
        del self._sequences[position]

    def pop(self, position: int) -> Sequence:
        return self._sequences.pop(position)

    def check(self) -> None:
        """Raises IntegrityError unless ranks strictly increase."""
        ranks = [sequence.rank for sequence in self._sequences]
        if any(a >= b for a, b in pairwise(ranks)):
            raise IntegrityError(f"the {self._name} sequences are out of order")
