"""The accuracy gate of this project itself: sums that the embedded model can do, against its recorded evaluation.

The sums are our own, in the form of GSM8K, which the embedded model is too small for. docs/gates.md says how to record
them anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lockstep.ci.gates.accuracy_file import read_evaluation
from lockstep.ci.gates.gsm8k import load_problems
from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu", seconds=10)

SUMS = Path(__file__).parent / "sums"
RECORDED = SUMS / "embedded.json"
GATES = ("--min-accuracy", "0.7", "--against", str(RECORDED))


def gate(*options: str) -> int:
    return main(["eval", "gsm8k", "--data", str(SUMS), "--max-tokens", "32", *GATES, *options])


def test_the_embedded_model_is_as_often_right_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate() == 0
    out = capsys.readouterr().out
    assert "accuracy: pass" in out and "against the baseline: pass" in out


def test_an_engine_that_computes_nothing_fails_both_gates(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--device", "null") == 1
    out = capsys.readouterr().out
    assert "accuracy: fail" in out and "against the baseline: fail" in out


def test_the_sums_and_the_record_are_what_they_seem() -> None:
    training, test = load_problems(str(SUMS))
    for problem in (*training, *test):
        had, more = map(int, re.findall(r"\d+", problem.question))
        assert problem.expected == had + more
    recorded = read_evaluation(RECORDED)
    assert len(test) == len(recorded.marked) == 40 and recorded.num_right >= 36
    assert set(recorded.conditions.problem_ids) == {problem.problem_id for problem in test}
