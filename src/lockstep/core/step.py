"""The seam between scheduler and executor: plain, recordable, replayable.

There is no prefill phase and no decode phase, only tokens still owed. A step computes some owed tokens of some
sequences; a sequence whose last known token is computed yields at least one new token.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.request import FinishReason, Pooling
from lockstep.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence enters the executor (first time, or again after preemption).

    `token_ids` are all known tokens: prompt, then what was generated before a preemption. The first
    `num_cached_tokens` already have KV in `page_ids` (whole pages, shared, never written).
    """

    seq_id: int
    params: SamplingParams
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    page_ids: tuple[int, ...]
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Tokens [start, start + num_tokens) of one sequence, computed in this step.

    `new_page_ids` are appended to the sequence's page table before the step. `samples` is true when this
    slice reaches the last known token, so that its last row decides the next one.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_page_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward of the engine. `ended` sequences (finished, aborted, preempted) leave before it runs.

    A slice is one kind of work; diffusion stages will be another field here, so a scheduler budget counts
    work, not tokens alone.
    """

    step_id: int
    started: tuple[SequenceStart, ...] = ()
    ended: tuple[int, ...] = ()
    slices: tuple[TokenSlice, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the forward."""
        return sum(piece.num_tokens for piece in self.slices)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of a token under the model, with the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What one step found for one sequence.

    `token_ids` are new tokens, in order: none when the slice did not sample, several when speculation
    accepted them. `logprobs` is as long as `token_ids`, or empty when not asked. `prompt_logprobs` belong to
    the prompt rows of this slice: row at position p describes token p + 1. `complete` says that a feature
    (a grammar) allows nothing more. `error` ends the sequence with this message.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] | None = None
    complete: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to a StepPlan, in the order of its slices."""

    step_id: int
    sequences: tuple[SequenceResult, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """What the scheduler tells the outside about one choice (`index` of 0..n-1) of a request after a step."""

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
