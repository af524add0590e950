"""Evaluations of respondents whose answers are known, the threshold and the paired gate, and their files."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_respondents import EXCERPT, ScriptedRespondent, knows

from lockstep.ci.gates.accuracy import (
    Change,
    Conditions,
    Evaluation,
    Marked,
    compare,
    evaluate,
    judge_change,
    judge_threshold,
)
from lockstep.ci.gates.accuracy_file import as_document, read_evaluation
from lockstep.ci.gates.files import require_writable, write_json
from lockstep.ci.gates.gsm8k import load_problems, make_exam
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu", seconds=2)

EXAM = make_exam(*load_problems(str(EXCERPT)), num_shots=2, num_questions=None, seed=0)
CONDITIONS = Conditions.of(EXAM, task="gsm8k", seed=0, max_tokens=64)


def answered(rights: list[bool], **conditions: Any) -> Evaluation:
    """An evaluation of as many questions, answered so."""
    asked = Conditions(
        task="gsm8k",
        seed=0,
        max_tokens=64,
        example_ids=("e0", "e1"),
        problem_ids=tuple(f"q{number}" for number in range(len(rights))),
    )
    found = ("1" if right else "2" for right in rights)
    marked = tuple(
        Marked(expected="1", found=number, right=number == "1", cut=False, text=number) for number in found
    )
    return Evaluation(
        model="scripted",
        conditions=dataclasses.replace(asked, **conditions),
        num_available=1319,
        marked=marked,
    )


def shares(num_right: int, num_asked: int) -> Evaluation:
    return answered([True] * num_right + [False] * (num_asked - num_right))


def test_answers_are_marked_in_the_order_of_the_exam() -> None:
    wrong = {question.question for question in EXAM.questions[3:6]}
    respondent = ScriptedRespondent(knows(wrong_about=lambda question: question in wrong))
    heard: list[tuple[int, int]] = []
    found = evaluate(
        respondent, EXAM, CONDITIONS, concurrency=4, progress=lambda done, total: heard.append((done, total))
    )
    assert [one.right for one in found.marked] == [True] * 3 + [False] * 3 + [True] * 6
    assert found.num_right == 9 and found.share == 0.75 and found.num_without_number == 0
    assert [one.expected for one in found.marked] == [str(question.expected) for question in EXAM.questions]
    assert {one.found for one in found.marked if not one.right} == {"-12345"}
    assert sorted(respondent.prompts) == sorted(EXAM.prompt(question) for question in EXAM.questions)
    assert heard == [(done, 12) for done in range(1, 13)]


def test_silence_is_wrong_and_counted() -> None:
    found = evaluate(ScriptedRespondent(lambda question: "I do not know."), EXAM, CONDITIONS, concurrency=1)
    assert (found.num_right, found.num_without_number) == (0, 12)


@pytest.mark.parametrize(
    ("num_right", "num_asked", "threshold", "outcome"),
    [
        (70, 100, 0.5, "pass"),
        (55, 100, 0.5, "undecided"),  # the mean is above, the interval is not
        (45, 100, 0.5, "undecided"),
        (30, 100, 0.5, "fail"),
        (20, 20, 0.9, "undecided"),  # all right, and still too few questions to say so
        (0, 20, 0.1, "undecided"),
        (0, 20, 0.2, "fail"),
    ],
)
def test_the_threshold_gate(num_right: int, num_asked: int, threshold: float, outcome: str) -> None:
    verdict = judge_threshold(shares(num_right, num_asked), threshold)
    assert verdict.outcome == outcome and verdict.passed == (outcome == "pass")


@pytest.mark.parametrize(
    ("num_right", "num_asked", "threshold", "advice"),
    [
        (55, 100, 0.5, "takes about 385 questions to tell (--num-questions)"),
        (51, 100, 0.5, "questions to tell and there are 1319"),
        (50, 100, 0.5, "no number of questions tells"),
    ],
)
def test_what_an_undecided_gate_advises(num_right: int, num_asked: int, threshold: float, advice: str) -> None:
    assert advice in judge_threshold(shares(num_right, num_asked), threshold).reason


def test_luck_does_not_pass() -> None:
    """A model exactly at the threshold, two thousand times."""
    seed = 7
    print(f"seed {seed}")
    draws = random.Random(seed)
    verdicts = [
        judge_threshold(shares(sum(draws.random() < 0.6 for _ in range(200)), 200), 0.6).outcome
        for _ in range(2_000)
    ]
    assert verdicts.count("pass") < 100 and verdicts.count("fail") < 100 and "undecided" in verdicts


def changed(was: Evaluation, num_lost: int, num_gained: int) -> Evaluation:
    """The same questions, with so many answers changed each way."""
    rights = [one.right for one in was.marked]
    for wanted, count in ((True, num_lost), (False, num_gained)):
        places = [at for at, one in enumerate(was.marked) if one.right == wanted][:count]
        for at in places:
            rights[at] = not wanted
    return answered(rights)


@pytest.mark.parametrize(
    ("num_lost", "num_gained", "outcome"),
    [(0, 0, "pass"), (5, 0, "pass"), (6, 0, "fail"), (11, 3, "pass"), (12, 3, "fail"), (0, 20, "pass")],
)
def test_the_paired_gate(num_lost: int, num_gained: int, outcome: str) -> None:
    baseline = shares(60, 100)
    change = compare(baseline, changed(baseline, num_lost, num_gained))
    assert change == Change(num_lost, num_gained, 100)
    assert judge_change(change).outcome == outcome


def test_the_paired_gate_sees_what_two_intervals_do_not() -> None:
    baseline = shares(600, 1000)
    worse = changed(baseline, 20, 2)
    assert worse.interval.high > baseline.interval.low
    verdict = judge_change(compare(baseline, worse))
    assert verdict.outcome == "fail" and "20 answers became wrong and 2 right of 1000 (-1.8%" in verdict.reason


def test_a_pass_says_what_would_have_failed() -> None:
    assert "10 lost answers would have failed" in judge_change(Change(3, 2, 100)).reason


def test_questions_are_paired_by_id_not_by_place() -> None:
    baseline = answered([True] * 10 + [False] * 10)
    names = tuple(reversed(baseline.conditions.problem_ids))
    assert compare(baseline, answered([False] * 10 + [True] * 10, problem_ids=names)) == Change(0, 0, 20)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"seed": 1}, "with seed 0, this run has 1"),
        ({"task": "other"}, "with task gsm8k, this run has other"),
        ({"max_tokens": 32}, "with max tokens 64, this run has 32"),
        ({"example_ids": ("e0",)}, "with shots 2, this run has 1"),
        ({"example_ids": ("e0", "e2")}, "2 examples, this run 2, and 1 are the same"),
        ({"problem_ids": tuple(f"q{n}" for n in range(1, 21))}, "20 questions, this run 20, and 19 are"),
    ],
)
def test_a_baseline_of_other_questions_is_refused(conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(shares(10, 20), dataclasses.replace(shares(10, 20), conditions=_with(conditions)))
    with pytest.raises(ConfigError, match="20 questions, this run 19"):
        compare(shares(10, 20), shares(10, 19))


def _with(conditions: dict[str, Any]) -> Conditions:
    return dataclasses.replace(shares(10, 20).conditions, **conditions)


def test_a_baseline_that_no_run_could_fail_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 right answers: losing all of them would be no evidence"):
        compare(shares(5, 100), shares(0, 100))
    assert judge_change(compare(shares(6, 100), shares(0, 100))).outcome == "fail"


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    found = evaluate(ScriptedRespondent(knows()), EXAM, CONDITIONS, concurrency=3)
    path = tmp_path / "run.json"
    write_json(as_document(found, [judge_threshold(found, 0.5)], None, {"devices": []}), path)
    assert read_evaluation(path) == found
    document = json.loads(path.read_text())
    assert document["result"]["num_right"] == 12 and document["verdicts"][0]["outcome"] == "pass"
    assert document["result"]["interval"] == pytest.approx([0.7575, 1.0], abs=1e-4)


def without_marks(document: dict[str, Any]) -> None:
    document["evaluation"]["marked"].pop()


def with_other_format(document: dict[str, Any]) -> None:
    document["format"] = "lockstep-evaluation-0"


def without_evaluation(document: dict[str, Any]) -> None:
    del document["evaluation"]


def with_wrong_type(document: dict[str, Any]) -> None:
    document["evaluation"]["marked"][0]["right"] = "yes"


@pytest.mark.parametrize("spoil", [without_marks, with_other_format, without_evaluation, with_wrong_type])
def test_a_spoilt_file_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(json.dumps(as_document(shares(10, 20), [], None, {})))
    spoil(document)
    path = tmp_path / "run.json"
    write_json(document, path)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_evaluation(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    for name in ("absent.json", "text.json"):
        with pytest.raises(ConfigError, match=name):
            read_evaluation(tmp_path / name)
    (tmp_path / "file").write_text("")
    for work in (require_writable, lambda path: write_json({}, path)):
        with pytest.raises(ConfigError, match="cannot be written"):
            work(tmp_path / "file" / "run.json")
        work(tmp_path / "new" / "folder" / "run.json")
        assert (tmp_path / "new" / "folder").is_dir()


def test_what_a_file_says_of_its_answers_is_not_trusted(tmp_path: Path) -> None:
    """Its right answers are counted anew from the words of the model."""
    path = tmp_path / "run.json"
    document = json.loads(json.dumps(as_document(shares(10, 20), [], None, {})))
    for one in document["evaluation"]["marked"]:
        one["right"] = False
    document["evaluation"]["marked"][0]["found"] = "7"
    write_json(document, path)
    assert read_evaluation(path) == shares(10, 20)
    document["evaluation"]["marked"][0]["expected"] = document["evaluation"]["marked"][0]["text"] = "9"
    write_json(document, path)
    with pytest.raises(ConfigError, match="takes 9 for the answer of question q0, and it is 1"):
        compare(read_evaluation(path), shares(10, 20))


def test_a_question_that_a_file_repeats_is_refused(tmp_path: Path) -> None:
    """Else six copies of one right answer would make a baseline that counts as six."""
    path = tmp_path / "run.json"
    document = json.loads(json.dumps(as_document(shares(10, 20), [], None, {})))
    document["evaluation"]["conditions"]["problem_ids"][1] = "q0"
    write_json(document, path)
    with pytest.raises(ConfigError, match="a question more than once"):
        read_evaluation(path)
