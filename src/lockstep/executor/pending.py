"""The second half of a step: from what the device found to a StepResult."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lockstep.core.errors import InvalidRequest
from lockstep.core.step import SequenceResult, StepPlan, StepResult
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.logprobs import ScoredTokens
from lockstep.executor.sampler import explain, unpack
from lockstep.executor.transfers import Fetched
from lockstep.platforms.base import DeviceEvent


@dataclass(slots=True)
class Findings:
    """What a step finds, on its way to the host. Slices are named by their number in the plan.

    `sampled` are those with a column in `chosen`, which is packed as Chosen packs it and may go on with padding;
    `scored` are those columns of them that `logprobs` tells of.
    """

    errors: dict[int, str] = field(default_factory=dict)
    embeddings: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[ScoredTokens]] = field(default_factory=dict)
    sampled: Sequence[int] = ()
    chosen: Fetched | None = None
    scored: Sequence[int] = ()
    logprobs: ScoredTokens | None = None

    def read_chosen(self) -> tuple[list[int], list[float]]:
        """The token and the best score of each that sampled."""
        return ([], []) if self.chosen is None else unpack(self.chosen.read(), len(self.sampled))


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step whose findings are there once `event` has passed; None when they are there."""

    plan: StepPlan
    findings: Findings
    hooks: Sequence[SamplerHook]
    event: DeviceEvent | None

    def result(self) -> StepResult:
        """Waits for the event. Raises what went wrong on the device."""
        if self.event is not None:
            self.event.synchronize()
        findings = self.findings
        token_ids, best = findings.read_chosen()
        found = self._results(token_ids)
        for index, scores in findings.prompt_logprobs.items():
            found[index].prompt_logprobs = tuple(row for piece in scores for row in piece.read())
        for index, unit_D in findings.embeddings.items():
            found[index].embedding = tuple(unit_D.tolist())
        if findings.logprobs is not None:
            for row, logprob in zip(findings.scored, findings.logprobs.read(), strict=True):
                found[findings.sampled[row]].logprobs = (logprob,)
        self._refuse_tokens(found, best)
        self._tell_hooks(found)
        for index, error in findings.errors.items():
            found[index].error = error
        return StepResult(self.plan.step_id, tuple(found))

    def _results(self, token_ids: Sequence[int]) -> list[SequenceResult]:
        """A result for each slice, with its token where one was sampled."""
        slices = self.plan.slices
        tokens_of: list[tuple[int, ...]] = [()] * len(slices)
        for index, token_id in zip(self.findings.sampled, token_ids, strict=True):
            tokens_of[index] = (token_id,)
        return [SequenceResult(piece.seq_id, tokens) for piece, tokens in zip(slices, tokens_of, strict=True)]

    def _refuse_tokens(self, found: list[SequenceResult], best: Sequence[float]) -> None:
        """Puts errors in the place of tokens that were no choice."""
        if math.isfinite(sum(best)):
            return  # A sum is finite only when every part of it is.
        for index, score in zip(self.findings.sampled, best, strict=True):
            error = explain(score)
            if error is not None:
                found[index].token_ids = found[index].logprobs = ()
                found[index].error = error

    def _tell_hooks(self, found: list[SequenceResult]) -> None:
        """Tells the hooks of the tokens: an answer may be complete, or lost."""
        hooks = [hook for hook in self.hooks if hook.active([result.seq_id for result in found])]
        for index in self.findings.sampled if hooks else ():
            result = found[index]
            try:
                for token_id in result.token_ids:
                    # Every hook hears of the token, whatever the others say.
                    result.complete = any([hook.accept(result.seq_id, token_id) for hook in hooks])
            except InvalidRequest as refusal:
                found[index] = SequenceResult(result.seq_id, error=str(refusal))
