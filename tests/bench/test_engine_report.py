"""The report of what the engine was seen to do: its parts in small, its page, and the one that is in the repository."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import engine_report
from evidence import facts, greedy, lm_eval, openai_calls, schemas, traffic
from evidence.part import Findings, Part, cell

pytestmark = pytest.mark.suite("cpu")

TABLE = """
|     Tasks     |Version| Filter |n-shot|  Metric   |   |Value |   |Stderr|
|---------------|------:|--------|-----:|-----------|---|-----:|---|-----:|
|capitals_answer|      1|stripped|     0|exact_match|↑  |0.9167|±  |0.0833|
|capitals_choice|      1|none    |     0|acc        |↑  |1.0000|±  |0.0000|
|               |       |none    |     0|acc_norm   |↑  |0.7500|±  |0.1306|
"""


def committed(name: str) -> Any:
    return json.loads((engine_report.OUT / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_in_the_repository_is_that_of_its_findings() -> None:
    records = [committed(name) for name in engine_report.PARTS]
    assert engine_report.page(records) == (engine_report.OUT / "README.md").read_text(encoding="utf-8")
    assert all(one["found"]["passed"] for one in records)


def test_random_steps_are_counted() -> None:
    found = traffic.collect(steps_each=800)
    assert found["passed"] and found["num_episodes_each"] == 2
    in_turn, late = (run["seen"] for run in found["runs"])
    assert min(in_turn["steps"], late["steps"]) >= 800
    assert in_turn.get("planned ahead", 0) == 0 < late["planned ahead"]
    assert f"Seeds {found['first_seed']} to {found['first_seed'] + 1}," in traffic.page(found)


def test_schemas_are_answered_by_both() -> None:
    found = schemas.collect(num_schemas=8)
    assert found["passed"] and [way["num_valid"] for way in found["ways"].values()] == [8, 8]
    assert f"Seed {found['seed']}." in schemas.page(found)


@pytest.mark.parametrize(("name", "page"), [("greedy", greedy.page), ("facts", facts.page)])
def test_what_differs_is_shown(name: str, page: Callable[[Findings], str]) -> None:
    found = committed(name)["found"]
    rows = [line for line in page(found).splitlines() if line.startswith("| `") or "? | `" in line]
    if name == "facts":
        differing = [one["gap"] for one in found["questions"] if one["gap"] is not None]
        assert len(rows) == len(found["questions"]) == 20
    else:
        prompts = [one for way in found["ways"].values() for one in way["prompts"]]
        differing = [one["first_difference"]["gap"] for one in prompts if one["first_difference"]]
        assert len(rows) == len(prompts) == 16
    assert differing and all(f"| {gap:.4f} |" in page(found) for gap in differing)


def test_scores_of_the_harness() -> None:
    lines = TABLE.strip().splitlines()
    expected = {
        "capitals_answer exact_match": 0.9167,
        "capitals_choice acc": 1.0,
        "capitals_choice acc_norm": 0.75,
    }
    assert lm_eval.scores(lines) == expected


def test_calls_are_noted_with_what_came_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(status_code=400, headers={}, request=None)
    body = {"message": "no such thing", "code": "odd"}
    refusal = openai.BadRequestError("Error code: 400", response=response, body=body)

    def answer(self: Any, cast_to: Any, options: Any, **how: Any) -> Any:
        if options.json_data["prompt"] == "bad":
            raise refusal
        choice = {"index": 0, "finish_reason": "length", "text": "b", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        whole = {"id": "x", "created": 1, "model": "m", "object": "text_completion", "usage": usage}
        return cast_to.model_validate(whole | {"choices": [choice]})

    monkeypatch.setattr(openai.OpenAI, "request", answer)
    recorder = openai_calls.Recorder()
    recorder.pytest_runtest_logstart("file.py::test_one")
    client = openai.OpenAI(base_url="http://127.0.0.1:9", api_key="unused")
    with openai_calls.recorded_calls(recorder.note):
        client.completions.create(model="m", prompt="a", max_tokens=7, extra_body={"top_k": 3})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="m", prompt="bad")
    client.completions.create(model="m", prompt="not noted")
    assert recorder.tests == [
        {
            "test": "test_one",
            "passed": False,
            "calls": [
                {
                    "call": "POST /completions",
                    "asked": ["max_tokens=7", "top_k=3"],
                    "outcome": "length; 7 tokens",
                },
                {"call": "POST /completions", "asked": [], "outcome": "400 odd: no such thing"},
            ],
        }
    ]
    found = {"passed": False, "client": "openai 1", "tests": recorder.tests}
    assert (
        "| one | **no** | POST /completions | `max_tokens=7, top_k=3` | length; 7 tokens |"
        in openai_calls.page(found)
    )


def test_a_part_alone_leaves_the_others_and_decides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = {"one": True, "other": True}

    def part(name: str) -> Part:
        return Part(name, f"part {name}", lambda: {"passed": passes[name]}, lambda found: "text")

    parts = {name: part(name) for name in passes}
    monkeypatch.setattr(engine_report, "PARTS", parts)
    run = ["report", "--out", str(tmp_path)]

    def report(*names: str) -> int:
        monkeypatch.setattr(sys, "argv", [*run, *names])
        return engine_report.main()

    assert report() == 0
    passes["other"] = False
    assert report("one") == 0, "what was found of the other stays"
    assert report("other") == 1
    text = (tmp_path / "README.md").read_text()
    assert "| part one | yes |" in text and "| part other | **no** |" in text
    assert report("one") == 1, "a page with a failure says so"
    with pytest.raises(SystemExit, match="2"):
        report("nothing")
    assert "unknown part 'nothing': there are one, other" in capsys.readouterr().err


def test_cells_hold_any_text() -> None:
    assert cell('a|b\n"c"') == r'`a\|b\n"c"`'
