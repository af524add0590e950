"""One evaluation, question by question, and the two gates on it: against a threshold, and against an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lockstep.ci.gates.asking import Reply, Respondent, ask_all
from lockstep.ci.gates.final_answer import final_number
from lockstep.ci.gates.gsm8k import STOP, Exam
from lockstep.ci.gates.proportions import (
    CONFIDENCE,
    Interval,
    fewest_significant_losses,
    mcnemar_p,
    questions_to_decide,
    wilson_interval,
)
from lockstep.ci.gates.verdict import Verdict
from lockstep.core.errors import ConfigError

SIGNIFICANCE = 1 - CONFIDENCE
"""Of the paired test, two-sided: an equally good model fails in at most 2.5% of all comparisons."""
_REMEDY = "ask the same, or record a new baseline with --output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What was asked, and how: runs are compared under equal ones alone."""

    task: str
    seed: int
    max_tokens: int
    example_ids: tuple[str, ...]
    problem_ids: tuple[str, ...]

    @classmethod
    def of(cls, exam: Exam, *, task: str, seed: int, max_tokens: int) -> Conditions:
        return cls(
            task=task,
            seed=seed,
            max_tokens=max_tokens,
            example_ids=tuple(example.problem_id for example in exam.examples),
            problem_ids=tuple(question.problem_id for question in exam.questions),
        )

    @property
    def num_shots(self) -> int:
        return len(self.example_ids)


@dataclass(frozen=True, slots=True)
class Marked:
    """One question of an evaluation. `found` is the number read from the model's `text`, None where there is none."""

    expected: str
    found: str | None
    right: bool
    cut: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How one model answered: `marked` has one entry per question, in the order of the conditions."""

    model: str
    conditions: Conditions
    num_available: int
    marked: tuple[Marked, ...]

    @property
    def num_right(self) -> int:
        return sum(one.right for one in self.marked)

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.num_right / len(self.marked)

    @property
    def interval(self) -> Interval:
        """Of the share, had all questions of this kind been asked."""
        return wilson_interval(self.num_right, len(self.marked))

    def by_problem(self) -> dict[str, Marked]:
        """Problem id -> its answer."""
        return dict(zip(self.conditions.problem_ids, self.marked, strict=True))

    @property
    def num_without_number(self) -> int:
        return sum(one.found is None for one in self.marked)

    @property
    def num_cut(self) -> int:
        return sum(one.cut for one in self.marked)


def evaluate(
    respondent: Respondent,
    exam: Exam,
    conditions: Conditions,
    *,
    concurrency: int,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Asks every question and marks the answers; `progress` hears how many of how many are done.

    Raises LockstepError when one was not answered.
    """
    replies = ask_all(
        respondent,
        [exam.prompt(question) for question in exam.questions],
        concurrency=concurrency,
        max_tokens=conditions.max_tokens,
        stop=STOP,
    )
    marked: dict[int, Marked] = {}
    for index, reply in replies:
        marked[index] = mark(exam.questions[index].expected, reply)
        if progress is not None:
            progress(len(marked), len(exam.questions))
    return Evaluation(
        model=respondent.name,
        conditions=conditions,
        num_available=exam.num_available,
        marked=tuple(marked[index] for index in range(len(exam.questions))),
    )


def mark(expected: Fraction, reply: Reply) -> Marked:
    """Reads the number of an answer and compares it, exactly."""
    found = final_number(reply.text)
    return Marked(
        expected=str(expected),
        found=None if found is None else str(found),
        right=found == expected,
        cut=reply.cut,
        text=reply.text,
    )


def judge_threshold(evaluation: Evaluation, threshold: float) -> Verdict:
    """Passes when the whole interval lies above `threshold`, fails when it lies below, else is undecided."""
    interval, num_asked = evaluation.interval, len(evaluation.marked)
    range_text = f"[{interval.low:.1%}, {interval.high:.1%}]"
    if interval.low >= threshold:
        return Verdict("accuracy", "pass", f"the interval {range_text} lies above {threshold:.1%}")
    if interval.high <= threshold:
        return Verdict("accuracy", "fail", f"the interval {range_text} lies below {threshold:.1%}")
    needed = questions_to_decide(evaluation.share, threshold)
    if needed is None:
        advice = f"{evaluation.share:.1%} are right, which no number of questions tells from it"
    elif needed <= evaluation.num_available:
        advice = f"it takes about {needed} questions to tell (--num-questions)"
    else:
        advice = f"it takes about {needed} questions to tell and there are {evaluation.num_available}"
    return Verdict(
        "accuracy",
        "undecided",
        f"the interval {range_text} of {num_asked} questions contains {threshold:.1%}: {advice}",
    )


@dataclass(frozen=True, slots=True)
class Change:
    """Two evaluations of the same questions: answers that became wrong, and that became right."""

    num_lost: int
    num_gained: int
    num_asked: int

    @property
    def p_value(self) -> float:
        return mcnemar_p(self.num_lost, self.num_gained)

    @property
    def num_losses_to_fail(self) -> int:
        """With as many answers gained, so many lost ones fail."""
        return fewest_significant_losses(self.num_gained, SIGNIFICANCE)

    @property
    def share(self) -> float:
        """Change of the share of right answers."""
        return (self.num_gained - self.num_lost) / self.num_asked

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "num_lost": self.num_lost,
            "num_gained": self.num_gained,
            "share": self.share,
            "p_value": self.p_value,
            "num_losses_to_fail": self.num_losses_to_fail,
        }


def require_comparable(baseline: Evaluation, conditions: Conditions) -> None:
    """Raises ConfigError unless a run under `conditions` can be paired with the baseline, and could fail.

    Needs no answers, so that nobody waits for a run that would be refused.
    """
    was = baseline.conditions
    for name in ("task", "seed", "max_tokens", "num_shots"):
        before, now = getattr(was, name), getattr(conditions, name)
        if before != now:
            words = name.removeprefix("num_").replace("_", " ")
            raise ConfigError(f"the baseline was taken with {words} {before}, this run has {now}: {_REMEDY}")
    for name in ("example_ids", "problem_ids"):
        before, now = set(getattr(was, name)), set(getattr(conditions, name))
        if before != now:
            what = "examples" if name == "example_ids" else "questions"
            raise ConfigError(
                f"the baseline has {len(before)} {what}, this run {len(now)}, and {len(before & now)} are the same: "
                f"{_REMEDY}"
            )
    needed = fewest_significant_losses(0, SIGNIFICANCE)
    if baseline.num_right < needed:
        raise ConfigError(
            f"the baseline has {baseline.num_right} right answers: losing all of them would be no evidence, the gate "
            f"could not fail; it takes {needed}, ask more questions"
        )


def compare(baseline: Evaluation, evaluation: Evaluation) -> Change:
    """Pairs two evaluations question by question.

    Raises ConfigError unless they are comparable and hold the same number for right.
    """
    require_comparable(baseline, evaluation.conditions)
    before, after = baseline.by_problem(), evaluation.by_problem()
    for problem_id, then in before.items():
        if then.expected != after[problem_id].expected:
            raise ConfigError(
                f"the baseline takes {then.expected} for the answer of question {problem_id}, and it is "
                f"{after[problem_id].expected}: {_REMEDY}"
            )
    pairs = [(before[problem_id].right, now.right) for problem_id, now in after.items()]
    return Change(pairs.count((True, False)), pairs.count((False, True)), len(pairs))


def judge_change(change: Change) -> Verdict:
    """Fails when more answers were lost than gained and the paired test is significant."""
    counts = (
        f"{change.num_lost} answers became wrong and {change.num_gained} right of {change.num_asked} "
        f"({change.share:+.1%}, McNemar p = {change.p_value:.2g})"
    )
    if change.num_lost > change.num_gained and change.p_value < SIGNIFICANCE:
        return Verdict("against the baseline", "fail", f"{counts}: worse than the baseline")
    return Verdict(
        "against the baseline", "pass", f"{counts}; {change.num_losses_to_fail} lost answers would have failed"
    )
