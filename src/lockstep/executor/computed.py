"""What a step has computed of its rows before tokens are chosen.

Shapes: T rows of the step, R of them whose hidden state is there, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lockstep.executor.inputs import StepRows
from lockstep.platforms.base import DeviceGraph


class RecordedChoice:
    """The greedy choice after a recorded step: a graph of its own, for there are steps that draw.

    `choose`, which is recorded, gives what `Chosen.packed` does of all rows, and keeps the tokens for the next step.
    """

    def __init__(self, graph: DeviceGraph, choose: Callable[[], torch.Tensor]) -> None:
        self._graph = graph
        with graph.capture():
            self._chosen_2T = choose()

    def replay(self) -> torch.Tensor:
        """What `choose` gives after the step's last replay; valid until the next one of any graph."""
        self._graph.replay()
        return self._chosen_2T


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows on the device; those of padding, where there are some, come last.

    `hidden_RD` are the hidden states of the rows that `wanted_R` numbers, in this order, or of all rows where it is
    None. `wanted_R` begins with the last rows of the slices that sample, in the order of the slices, and may end with
    rows that nobody asked for.
    A recorded step of single tokens has the scores of every row, too, and the greedy choice among them where that
    could be recorded.
    """

    rows: StepRows
    hidden_RD: torch.Tensor
    logits_TV: torch.Tensor | None = None
    choice: RecordedChoice | None = None
    wanted_R: torch.Tensor | None = None
