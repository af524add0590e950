"""What a feature may do to sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lockstep.core.step import SequenceStart


class SamplerHook(Protocol):
    """A feature that constrains or follows the tokens of some sequences (structured output, for one)."""

    def start(self, seq_id: int, start: SequenceStart) -> None:
        """A sequence enters. After a preemption its generated tokens are in `start.token_ids`.

        Raises InvalidRequest when the sequence cannot be served; it then ends with that message.
        """
        ...

    def end(self, seq_id: int) -> None:
        """The sequence left. Unknown ids are ignored."""
        ...

    def active(self, seq_ids: Sequence[int]) -> bool:
        """True when it follows or constrains one of these; else it is asked and told nothing of a step."""
        ...

    def mask(self, seq_ids: Sequence[int], logits: torch.Tensor) -> None:
        """Set forbidden tokens of each sequence's row of logits [rows, vocab] to -inf, in place."""
        ...

    def accept(self, seq_id: int, token_id: int) -> bool:
        """The sequence took this token. True when nothing but its end may follow."""
        ...
