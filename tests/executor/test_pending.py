"""What becomes of the findings of a step on the host, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from lockstep.core.errors import InvalidRequest
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceResult, SequenceStart, StepPlan, TokenLogprob, TokenSlice
from lockstep.executor.inputs import build_inputs
from lockstep.executor.logprobs import ScoredTokens
from lockstep.executor.pending import Findings, PendingStep
from lockstep.executor.sampler import Chosen
from lockstep.executor.sequences import SequenceTable
from lockstep.executor.transfers import Transfers

pytestmark = pytest.mark.suite("cpu")

LARGEST = torch.finfo(torch.float32).max
NO_CHOICE = {-math.inf: "no token is allowed here", math.inf: "not numbers", math.nan: "not numbers"}


class Listener:
    """Follows some sequences; token 7 completes one, token 8 loses it."""

    def __init__(self, *seq_ids: int) -> None:
        self._seq_ids = set(seq_ids)
        self.heard: list[tuple[int, int]] = []

    def start(self, seq_id: int, start: SequenceStart) -> None: ...

    def end(self, seq_id: int) -> None: ...

    def active(self, seq_ids: Sequence[int]) -> bool:
        return not self._seq_ids.isdisjoint(seq_ids)

    def mask(self, seq_ids: Sequence[int], logits: torch.Tensor) -> None: ...

    def accept(self, seq_id: int, token_id: int) -> bool:
        self.heard.append((seq_id, token_id))
        if token_id == 8:
            raise InvalidRequest("lost")
        return token_id == 7 and seq_id in self._seq_ids


def results(findings: Findings, *hooks: Listener, num_slices: int = 5) -> list[SequenceResult]:
    """Of a step of sequences 10, 11 and so on."""
    plan = StepPlan(3, slices=tuple(TokenSlice(10 + at, 4, 1, (), True) for at in range(num_slices)))
    answer = PendingStep(plan, findings, hooks, None).result()
    assert answer.step_id == 3 and [each.seq_id - 10 for each in answer.sequences] == list(range(num_slices))
    return list(answer.sequences)


def sampled(tokens: dict[int, int], best: Sequence[float] | None = None) -> Findings:
    """These slices found these tokens, with these best scores."""
    best_R = torch.tensor([1.0] * len(tokens) if best is None else best)
    chosen = Chosen(torch.tensor(list(tokens.values())), best_R)
    return Findings(
        sampled=list(tokens),
        chosen=Transfers(torch.device("cpu")).fetch(chosen.packed()),
    )


def test_tokens_go_to_the_slices_that_sampled() -> None:
    found = results(sampled({0: 5, 2: 6, 4: 7}))
    assert [each.token_ids for each in found] == [(5,), (), (6,), (), (7,)]
    assert results(Findings()) == [SequenceResult(10 + at) for at in range(5)]


@pytest.mark.parametrize("bad", list(NO_CHOICE), ids=str)
@pytest.mark.parametrize("others", [0.5, LARGEST, -LARGEST], ids=str)
def test_row_without_a_choice_fails_alone(bad: float, others: float) -> None:
    logprobs = ScoredTokens(torch.tensor([5, 6]), torch.tensor([-1.0, -2.0]), None, None, [0, 0])
    findings = sampled({1: 5, 2: 6, 3: 7, 4: 8}, [others, bad, others, others])
    findings.scored, findings.logprobs = [0, 1], logprobs
    found = results(findings)
    assert [each.token_ids for each in found] == [(), (5,), (), (7,), (8,)]
    assert [each.error is None for each in found] == [True, True, False, True, True]
    assert NO_CHOICE[bad] in (found[2].error or "")
    assert found[1].logprobs == (TokenLogprob(5, -1.0),) and found[2].logprobs == ()


def test_rows_that_fail_against_each_other_fail_both() -> None:
    found = results(sampled({0: 5, 1: 6, 2: 7}, [math.inf, 1.0, -math.inf]))
    assert [each.error is None for each in found[:3]] == [False, True, False]


def test_hooks_hear_of_every_token_of_a_step_that_they_follow() -> None:
    """One that follows nobody in the step is not asked; one that refuses a token loses that sequence alone."""
    follower, other, stranger = Listener(11, 12), Listener(14), Listener(99)
    findings = sampled({0: 5, 1: 7, 2: 8, 4: 7}, [1.0, 1.0, 1.0, math.nan])
    found = results(findings, follower, other, stranger)
    assert [each.complete for each in found] == [False, True, False, False, False]
    assert found[2] == SequenceResult(12, error="lost")
    assert found[4].token_ids == () and found[4].error is not None
    assert follower.heard == [(10, 5), (11, 7), (12, 8)]
    assert other.heard == [(10, 5), (11, 7)] and stranger.heard == []


def test_slots_follow_sequences() -> None:
    """Slots are found by sequence, given again after an end, and say whose next tokens are scored."""
    sequences = SequenceTable(3)

    def start(seq_id: int, logprobs: int | None) -> SequenceStart:
        return SequenceStart(seq_id, SamplingParams(logprobs=logprobs), (1, 2), 2, 0, (seq_id,))

    slices = tuple(TokenSlice(seq_id, 0, 2, (), seq_id != 6) for seq_id in (5, 6, 7))
    sequences.apply(StepPlan(0, (start(5, None), start(6, 0), start(7, 2)), (), slices))
    before = sequences.slots(slices)
    assert sorted(before.tolist()) == [1, 2, 3]
    assert sequences.is_scored_S[before].tolist() == [False, True, True]
    inputs = build_inputs(StepPlan(1, slices=slices), sequences, 4)
    assert inputs.samples_B.tolist() == [True, False, True]
    assert inputs.owner_B.tolist() == before.tolist()

    again = (slices[0], TokenSlice(8, 0, 2, (), True), slices[2])
    assert sequences.apply(StepPlan(2, (start(8, None),), (6,), again)) == [before[1]]
    assert sequences.slots(again).tolist() == before.tolist()
    assert not sequences.is_scored_S[before[1]]
    with pytest.raises(KeyError):
        sequences.slots(slices)
