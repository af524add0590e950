"""GSM8K: its files, the examples and questions of one run, and the prompts.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021; MIT licence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lockstep.ci.gates.final_answer import final_number
from lockstep.ci.gates.hub_data import read_hub_split
from lockstep.core.errors import ConfigError

HUB_ID = "openai/gsm8k"
STOP = "Question:"
"""Begins the next question, which a model that only continues text would invent."""

_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the worked answer, and the number that is right.

    `problem_id` is decided by the text alone, so that two runs can be compared question by question.
    """

    question: str
    answer: str
    expected: Fraction

    @classmethod
    def of(cls, question: str, answer: str) -> Problem:
        """Raises ValueError when the answer does not end in "#### NUMBER"."""
        _, marker, ending = answer.partition("####")
        expected = final_number(ending)
        if not marker or expected is None:
            raise ValueError('the answer does not end in "#### NUMBER"')
        return cls(question.strip(), _CALCULATOR_NOTE.sub("", answer.strip()), expected)

    @property
    def problem_id(self) -> str:
        return _digest(f"{self.words}\n{self.expected}")

    @property
    def words(self) -> str:
        """The question without case, punctuation and spacing: equal for copies that look different."""
        return _NO_WORD.sub(" ", self.question.casefold()).strip()


@dataclass(frozen=True, slots=True)
class Exam:
    """What one run asks. Examples are problems of the training file, questions of the test file, none of both."""

    examples: tuple[Problem, ...]
    questions: tuple[Problem, ...]
    num_available: int

    def prompt(self, question: Problem) -> str:
        """Worked examples, then the question, for a model that continues text."""
        solved = (f"{STOP} {example.question}\nAnswer: {example.answer}\n\n" for example in self.examples)
        return f"{''.join(solved)}{STOP} {question.question}\nAnswer:"


def make_exam(
    training: Sequence[Problem],
    test: Sequence[Problem],
    *,
    num_shots: int,
    num_questions: int | None,
    seed: int,
) -> Exam:
    """Draws examples from `training` and questions from `test` (None: all), decided by the seed.

    A run with more questions asks those of a smaller one and others. Raises ConfigError when there are too few, or
    when any training problem, drawn or not, is also a test problem: its answer would be shown and scored.
    """
    scored = {problem.words for problem in test}
    if shared := [problem for problem in training if problem.words in scored]:
        raise ConfigError(
            f"{len(shared)} problems of the training file are in the test file too, such as "
            f"{shared[0].question[:60]!r}: examples would be scored; use the original files"
        )
    if len(scored) < len(test):
        raise ConfigError(f"the test file repeats {len(test) - len(scored)} of its questions; use the original")
    if num_shots > len(training):
        raise ConfigError(f"--shots {num_shots} is more than the {len(training)} training problems")
    if num_questions is not None and num_questions > len(test):
        raise ConfigError(f"--num-questions {num_questions} is more than the {len(test)} test problems")
    return Exam(
        examples=tuple(_shuffled(training, f"{seed}/examples")[:num_shots]),
        questions=tuple(_shuffled(test, f"{seed}/questions")[:num_questions]),
        num_available=len(test),
    )


def load_problems(source: str) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of a directory (train*.jsonl, test.jsonl) or a Hub id.

    Raises ConfigError naming the file and line of what is wrong.
    """
    directory = Path(source)
    if directory.is_dir():
        return _read_split(directory, "train*.jsonl"), _read_split(directory, "test.jsonl")
    if source != HUB_ID:
        raise ConfigError(
            f"--data {source} is neither a directory with train.jsonl and test.jsonl nor {HUB_ID}"
        )
    return _hub_split("train"), _hub_split("test")


def _hub_split(split: str) -> list[Problem]:
    return _problems(read_hub_split(HUB_ID, split), f"{HUB_ID}, {split}")


def _read_split(directory: Path, pattern: str) -> list[Problem]:
    paths = sorted(directory.glob(pattern))
    if len(paths) != 1:
        raise ConfigError(f"--data {directory} must hold one {pattern}, it holds {len(paths)}")
    try:
        text = paths[0].read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{paths[0]} cannot be read as JSON lines: {error}") from None
    return _problems(rows, str(paths[0]))


def _problems(rows: Iterable[Mapping[str, Any]], where: str) -> list[Problem]:
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(Problem.of(row["question"], row["answer"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"{where}, problem {number} is no question with an answer: {error}") from None
    if not problems:
        raise ConfigError(f"{where} holds no problem")
    return problems


def _shuffled(problems: Sequence[Problem], seed: str) -> list[Problem]:
    """In the order of a hash: the same on every version of Python, and each prefix a random sample."""
    return sorted(problems, key=lambda problem: _digest(f"{seed}/{problem.problem_id}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
