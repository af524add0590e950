"""Counters that only grow."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.request import FinishReason
from lockstep.scheduler.sequence import Sequence


@dataclass(slots=True)
class Totals:
    """Named as in core.output.EngineStats. Finished and aborted count requests; a deadline is an abort.

    Prompt and cached tokens count once a request, when its first sequence is first admitted.
    """

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_discarded_rows: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    last_step_tokens: int = 0

    def count_admission(self, sequence: Sequence) -> None:
        if sequence.index == 0:
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += sequence.num_cached_tokens or 0

    def count_end_of_request(self, reason: FinishReason) -> None:
        if reason in ("abort", "deadline"):
            self.num_aborted += 1
        else:
            self.num_finished += 1
