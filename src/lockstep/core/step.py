"""The seam between scheduler and executor: plain, recordable, replayable.

There is no prefill phase and no decode phase, only tokens still owed. A step computes some owed tokens of some
sequences; a sequence whose last known token is computed yields at least one new token.

A plan may be made before the result of the one before it is there. The token that a step in flight will find is owed
like any other: only the executor has it when the next step begins, the scheduler learns it later.

What there is one of for each sequence and step is not frozen, which would take four times as long to make; nobody
writes to it once it was handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lockstep.core.request import FinishReason, Pooling
from lockstep.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence enters the executor (first time, or again after preemption).

    `token_ids` are all known tokens: prompt, then what was generated before a preemption. The first
    `num_cached_tokens` have KV in `page_ids` (whole pages, shared, never written by this sequence), or get it from
    slices before its own in the same plan, of several tokens each; where those are fewer, the first of the slice's new
    pages get the rest by the plan's page copies.
    """

    seq_id: int
    params: SamplingParams
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    page_ids: tuple[int, ...]
    pooling: Pooling | None = None


@dataclass(slots=True)
class TokenSlice:
    """Tokens [start, start + num_tokens) of one sequence, computed in this step.

    `new_page_ids` are appended to the sequence's page table before the step. `samples` is true when this
    slice reaches the last token, so that its last row decides the next one. The last token itself may have been
    sampled by the step before, and then be known to the executor alone.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_page_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class PageCopy:
    """What a page of the device holds, copied to a page of the host, or back."""

    page_id: int
    host_page_id: int
    to_host: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward of the engine. `ended` sequences (finished, aborted, preempted) leave before it runs.

    `page_copies` are made before it too, as if one after the other: a page may be copied from and then to. In each
    layer, the keys and values of all rows are stored before any row attends: slices may read pages that earlier ones
    write. Where all are of one token, none does: each may attend as soon as its own key and value are stored.

    A slice is one kind of work; diffusion stages will be another field here, so a scheduler budget counts
    work, not tokens alone. `must_land`: what may follow a token of this step is decided on the host (a grammar), so no
    plan may be made before its result was taken.
    """

    step_id: int
    started: tuple[SequenceStart, ...] = ()
    ended: tuple[int, ...] = ()
    slices: tuple[TokenSlice, ...] = ()
    must_land: bool = False
    page_copies: tuple[PageCopy, ...] = ()

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


@dataclass(slots=True)
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


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Waits until this step, and no later one, has run. Raises what went wrong on the device. Called once."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that had run when its submission returned."""

    answer: StepResult

    def result(self) -> StepResult:
        return self.answer


class Executor(Protocol):
    """Whoever computes plans: a model, or the null platform's counter."""

    def submit(self, plan: StepPlan) -> Pending:
        """Has everything of the plan under way when it returns, and waits for nothing. Steps run one after another."""
        ...

    def record_next(self) -> bool:
        """Does a little of what later steps would wait for; False when nothing is left to do. For idle moments."""
        ...


@dataclass(slots=True)
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
