"""What a step has computed of its rows before tokens are chosen.

Shapes: T rows of the step, R of them whose hidden state is there, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.executor.inputs import StepRows
from lockstep.platforms.base import DeviceGraph


class RecordedEnd:
    """What a recorded step may end with, of all rows: a graph of its own, for it may end otherwise."""

    def __init__(self, graph: DeviceGraph, compute: Callable[[], torch.Tensor]) -> None:
        self._graph = graph
        with graph.capture():
            result = compute()
        # Another end, or a step of another size, may lie in the same place.
        self._result = graph.place(result)

    def replay(self) -> torch.Tensor:
        """What is computed after the step's last replay; valid until the next one of any graph."""
        self._graph.replay()
        return self._result


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows on the device; those of padding, where there are some, come last.

    `hidden_RD` are the hidden states of the rows that `wanted_R` numbers, in this order, or of all rows where it is
    None. `wanted_R` begins with the last rows of the slices that sample, in the order of the slices, and may end with
    rows that nobody asked for.
    A recorded step of single tokens can go on to the scores of every row [T, V]; or, where that could be recorded, to
    the greedy choice among them, which gives what `Chosen.packed` does and keeps the tokens for the next step.
    """

    rows: StepRows
    hidden_RD: torch.Tensor
    scores: RecordedEnd | None = None
    choice: RecordedEnd | None = None
    wanted_R: torch.Tensor | None = None
