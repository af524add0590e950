"""The exam: where examples and questions come from, which are drawn, and files that are refused."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from scripted_respondents import EXCERPT

from lockstep.ci.gates.gsm8k import HUB_ID, Exam, Problem, load_problems, make_exam
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu", seconds=2)


def exam(*, num_shots: int = 3, num_questions: int | None = 5, seed: int = 0) -> Exam:
    training, test = load_problems(str(EXCERPT))
    return make_exam(training, test, num_shots=num_shots, num_questions=num_questions, seed=seed)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the excerpt, to be spoilt."""
    return Path(shutil.copytree(EXCERPT, tmp_path / "data"))


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def append(path: Path, row: Any) -> None:
    path.write_text(path.read_text("utf-8") + json.dumps(row) + "\n", "utf-8")


def test_the_answers_of_the_files() -> None:
    training, test = load_problems(str(EXCERPT))
    assert [problem.expected for problem in training[:4]] == [72, 10, 5, 42]
    assert [problem.expected for problem in test[:4]] == [18, 3, 70000, 540]
    assert "<<" not in training[0].answer and "48/2 = 24 clips" in training[0].answer


@pytest.mark.parametrize("seed", range(20))
def test_examples_are_training_problems_and_questions_test_problems(seed: int) -> None:
    drawn = exam(seed=seed)
    shown = {row["question"].strip() for row in lines(EXCERPT / "train.jsonl")}
    scored = {row["question"].strip() for row in lines(EXCERPT / "test.jsonl")}
    assert {example.question for example in drawn.examples} <= shown
    assert {question.question for question in drawn.questions} <= scored
    assert len(set(drawn.examples)) == 3 and len(set(drawn.questions)) == 5


@pytest.mark.parametrize(
    "disguise", [str, str.upper, lambda text: f"  {text} ", lambda text: re.sub(r"[.,'\u2019]| ", "\t", text)]
)
@pytest.mark.parametrize("num_shots", [0, 1, 8])
def test_a_planted_test_question_among_the_examples_is_caught(
    data: Path, disguise: Any, num_shots: int
) -> None:
    """Drawn or not, and whatever it looks like."""
    planted = lines(data / "test.jsonl")[4]
    append(data / "train.jsonl", {**planted, "question": disguise(planted["question"])})
    with pytest.raises(ConfigError, match="1 problems of the training file are in the test file"):
        make_exam(*load_problems(str(data)), num_shots=num_shots, num_questions=1, seed=0)


def test_the_test_file_given_as_training_file_is_caught(data: Path) -> None:
    shutil.copy(data / "test.jsonl", data / "train.jsonl")
    with pytest.raises(ConfigError, match="12 problems of the training file"):
        make_exam(*load_problems(str(data)), num_shots=5, num_questions=None, seed=0)


def test_a_question_that_counts_twice_is_refused(data: Path) -> None:
    append(data / "test.jsonl", lines(data / "test.jsonl")[0])
    with pytest.raises(ConfigError, match="repeats 1 of its questions"):
        make_exam(*load_problems(str(data)), num_shots=1, num_questions=None, seed=0)


def test_draws_depend_on_the_seed_alone_and_grow() -> None:
    assert exam() == exam()
    assert exam(seed=1).questions != exam().questions and exam(seed=1).examples != exam().examples
    assert exam(num_questions=8).questions[:5] == exam().questions
    assert exam(num_shots=5).examples[:3] == exam().examples
    assert len(exam(num_questions=None).questions) == 12 == exam().num_available


def test_the_draw_is_the_same_on_every_machine() -> None:
    """A baseline of today is compared with runs of other versions of Python."""
    assert [question.expected for question in exam().questions] == [45, 160, 260, 694, 20]


def test_every_problem_is_drawn_equally_often() -> None:
    counts: dict[Fraction, int] = {}
    for seed in range(600):
        for question in exam(seed=seed, num_questions=3).questions:
            counts[question.expected] = counts.get(question.expected, 0) + 1
    # 600 draws of 3 out of 12: 150 each, with a standard deviation of 10.6.
    assert len(counts) == 12 and all(100 < count < 200 for count in counts.values()), counts


def test_the_prompt_shows_worked_examples_and_asks_one_question() -> None:
    drawn = exam(num_shots=2)
    prompt = drawn.prompt(drawn.questions[0])
    assert prompt.count("Question: ") == 3 == prompt.count("\nAnswer:")
    assert prompt.count("####") == 2
    assert prompt.endswith(f"Question: {drawn.questions[0].question}\nAnswer:")
    assert f"{drawn.examples[0].question}\nAnswer: {drawn.examples[0].answer}\n\nQuestion:" in prompt
    assert drawn.questions[0].answer not in prompt


def test_an_id_names_question_and_answer() -> None:
    one, spaced = Problem.of("How many?", "#### 3"), Problem.of(" How  many? ", "Three.\n#### 3.0")
    assert one.problem_id == spaced.problem_id != Problem.of("How many?", "#### 4").problem_id


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_shots": 9}, "--shots 9 is more than the 8"),
        ({"num_questions": 13}, "--num-questions 13 is more than the 12"),
    ],
)
def test_more_than_there_is(wanted: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exam(**wanted)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "How many?"}, "problem 9 .*answer"),
        ({"question": "How many?", "answer": "3"}, "problem 9 .*NUMBER"),
        ({"question": "How many?", "answer": "#### many"}, "problem 9 .*NUMBER"),
        ({"question": 3, "answer": "#### 3"}, "problem 9"),
        ("How many?", "problem 9"),
    ],
)
def test_a_broken_problem_is_named(data: Path, row: Any, message: str) -> None:
    append(data / "train.jsonl", row)
    with pytest.raises(ConfigError, match=message):
        load_problems(str(data))


def test_broken_files(data: Path) -> None:
    (data / "test.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match=r"test.jsonl cannot be read as JSON lines"):
        load_problems(str(data))
    (data / "test.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"test.jsonl holds no problem"):
        load_problems(str(data))
    (data / "train_more.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"must hold one train\*.jsonl, it holds 2"):
        load_problems(str(data))


def test_a_name_that_is_no_data_set() -> None:
    with pytest.raises(ConfigError, match=f"nor {HUB_ID}"):
        load_problems("openai/gsm9k")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_hub_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of the Hub and of the reader of Parquet, with both replaced."""
    (tmp_path / "main").mkdir()
    asked = []

    def download(hub_id: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, repo_type))
        (tmp_path / allow_patterns[0].replace("*", "00000-of-00001")).touch()
        return str(tmp_path)

    def read_table(path: Path) -> Any:
        split = path.name.partition("-")[0]
        return types.SimpleNamespace(to_pylist=lambda: lines(EXCERPT / f"{split}.jsonl"))

    install(monkeypatch, "huggingface_hub", snapshot_download=download)
    install(monkeypatch, "pyarrow", parquet=types.SimpleNamespace(read_table=read_table))
    assert load_problems(HUB_ID) == load_problems(str(EXCERPT))
    assert set(asked) == {(HUB_ID, "dataset")}


def test_no_network_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("many\nlines")

    install(monkeypatch, "huggingface_hub", snapshot_download=unreachable)
    install(monkeypatch, "pyarrow", parquet=None)
    with pytest.raises(ConfigError, match=r"cannot be fetched .*ConnectionError.*--data DIR") as refused:
        load_problems(HUB_ID)
    assert "\n" not in str(refused.value)
    for missing in ("huggingface_hub", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(ConfigError, match=f"needs {missing}.*--data DIR"):
                load_problems(HUB_ID)


def test_the_extra_brings_what_the_hub_needs() -> None:
    """The nightly gate installs the extra and nothing else."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    brought = re.search(r"^hub = (\[.*\])$", text, re.MULTILINE)
    assert brought is not None
    names = {re.match(r"[\w-]+", package)[0] for package in ast.literal_eval(brought[1])}  # type: ignore[index]
    assert names >= {"huggingface_hub", "pyarrow"}
