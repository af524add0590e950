"""The second half of a step: from what the device found to a StepResult."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lockstep.core.errors import InvalidRequest
from lockstep.core.step import SequenceResult, StepPlan, StepResult, TokenLogprob
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.logprobs import ScoredTokens
from lockstep.executor.sampler import explain
from lockstep.platforms.base import DeviceEvent


@dataclass(slots=True)
class Findings:
    """What a step finds, on its way to the host. Slices are named by their number in the plan.

    `sampled` are those with a row in `token_ids_R` and `best_R`, `scored` those rows of them that `logprobs` tells of.
    """

    errors: dict[int, str] = field(default_factory=dict)
    embeddings: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[ScoredTokens]] = field(default_factory=dict)
    sampled: Sequence[int] = ()
    token_ids_R: torch.Tensor | None = None
    best_R: torch.Tensor | None = None
    scored: Sequence[int] = ()
    logprobs: ScoredTokens | None = None


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
        found = [SequenceResult(piece.seq_id) for piece in self.plan.slices]
        for index, scores in self.findings.prompt_logprobs.items():
            rows = tuple(row for piece in scores for row in piece.read())
            found[index].prompt_logprobs = rows
        for index, unit_D in self.findings.embeddings.items():
            found[index].embedding = tuple(unit_D.tolist())
        self._read_tokens(found)
        for index, error in self.findings.errors.items():
            found[index].error = error
        return StepResult(self.plan.step_id, tuple(found))

    def _read_tokens(self, found: list[SequenceResult]) -> None:
        findings = self.findings
        if findings.token_ids_R is None or findings.best_R is None:
            return
        logprobs: dict[int, TokenLogprob] = {}
        if findings.logprobs is not None:
            logprobs = dict(zip(findings.scored, findings.logprobs.read(), strict=True))
        rows = zip(findings.sampled, findings.token_ids_R.tolist(), findings.best_R.tolist(), strict=True)
        for row, (index, token_id, best) in enumerate(rows):
            result = found[index]
            result.error = explain(best)
            if result.error is not None:
                continue
            result.token_ids = (token_id,)
            if row in logprobs:
                result.logprobs = (logprobs[row],)
            try:
                # Every hook hears of the token, whatever the others say.
                result.complete = any([hook.accept(result.seq_id, token_id) for hook in self.hooks])
            except InvalidRequest as refusal:
                found[index] = SequenceResult(result.seq_id, error=str(refusal))
