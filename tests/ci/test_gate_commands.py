"""`lockstep eval` and `lockstep baseline`: what is printed and written, and the exit codes."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from gate_model import write_tiny_gguf
from scripted_respondents import EXCERPT, ScriptedServer, knows, scripted_server

from lockstep.bench import fingerprint as fingerprints
from lockstep.ci.gates.scenarios import SCENARIOS, Run, TextScenario
from lockstep.cli.main import main
from lockstep.config import Given

pytestmark = pytest.mark.suite("cpu", seconds=5)

Streams = pytest.CaptureFixture[str]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server(knows()) as running:
        yield running


def gsm8k(server: ScriptedServer, *arguments: str) -> int:
    return main(["eval", "gsm8k", "--url", server.url, "--data", str(EXCERPT), *arguments])


def test_an_evaluation_over_http(server: ScriptedServer, capsys: Streams) -> None:
    server.speaker = knows(wrong_about=lambda question: len(question) % 3 == 0)
    wrong = sum(len(json.loads(line)["question"]) % 3 == 0 for line in (EXCERPT / "test.jsonl").open())
    assert gsm8k(server) == 0
    out = capsys.readouterr().out
    for part in ("small", "12 of 12", f"{12 - wrong}", f"{1 - wrong / 12:.1%}", "95% interval"):
        assert part in out
    assert len(server.bodies) == 12 and all(body["prompt"].count("####") == 5 for body in server.bodies)


@pytest.mark.parametrize(
    ("threshold", "code", "said"),
    [("0.5", 0, "accuracy: pass"), ("0.9", 1, "accuracy: undecided"), ("0.7575", 0, "pass")],
)
def test_the_threshold_decides_the_exit_code(
    server: ScriptedServer, capsys: Streams, threshold: str, code: int, said: str
) -> None:
    assert gsm8k(server, "--min-accuracy", threshold) == code
    assert said in capsys.readouterr().out


def test_a_failing_gate(server: ScriptedServer, capsys: Streams) -> None:
    server.speaker = knows(wrong_about=lambda question: True)
    assert gsm8k(server, "--min-accuracy", "0.5") == 1
    assert "accuracy: fail" in capsys.readouterr().out


def test_a_later_run_against_an_earlier_one(server: ScriptedServer, capsys: Streams, tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    assert gsm8k(server, "--output", path) == 0
    assert gsm8k(server, "--against", path) == 0
    assert "against the baseline: pass" in capsys.readouterr().out
    server.speaker = knows(wrong_about=lambda question: True)
    assert gsm8k(server, "--against", path) == 1
    assert "12 answers became wrong and 0 right" in capsys.readouterr().out


def test_a_refused_baseline_asks_nothing(server: ScriptedServer, capsys: Streams, tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    assert gsm8k(server, "--output", path) == 0
    server.bodies.clear()
    for other in (["--seed", "1"], ["--shots", "2"], ["--num-questions", "11"], ["--max-tokens", "9"]):
        assert gsm8k(server, "--against", path, *other) == 2
        assert "record a new baseline" in capsys.readouterr().err
    assert server.bodies == []


def test_the_result_as_json(server: ScriptedServer, capsys: Streams, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert gsm8k(server, "large", "--num-questions", "4", "--json", "--output", str(path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed["evaluation"]["model"] == "large" and len(printed["evaluation"]["marked"]) == 4
    assert printed["machine"]["devices"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-accuracy", "0"], "min-accuracy"),
        (["--min-accuracy", "60"], "min-accuracy"),
        (["--num-questions", "13"], "more than the 12 test problems"),
        (["--threads", "2"], "--threads belongs to the server"),
        (["medium"], "serves no model medium"),
        (["--against", "absent.json"], "absent.json"),
        (["--output", "/proc/run.json", "--num-questions", "1"], "cannot be written"),
    ],
)
def test_bad_usage(server: ScriptedServer, capsys: Streams, arguments: list[str], message: str) -> None:
    assert gsm8k(server, *arguments) == 2
    assert message in capsys.readouterr().err
    assert server.bodies == [], "nothing is asked for a result that nobody could have"


def test_the_folder_of_the_result_is_made(server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "build" / "gates" / "gsm8k.json"
    assert gsm8k(server, "--output", str(path), "--num-questions", "1") == 0
    assert json.loads(path.read_text())["result"]["num_questions"] == 1


def test_a_server_that_fails_is_no_low_accuracy(server: ScriptedServer, capsys: Streams) -> None:
    server.failure = 500
    assert gsm8k(server, "--min-accuracy", "0.5") == 1
    assert "did not answer a question: status 500" in capsys.readouterr().err


class Scripted:
    """A scenario of two stages; `slow` is how much slower the second has become."""

    stages = ("start", "decode")

    def __init__(self) -> None:
        self.noise, self.slow = 0.005, 1.0
        self.num_runs = 0
        self._draws = random.Random(5)

    def describe(self) -> dict[str, Any]:
        return {"output_tokens": 8}

    def run(self, options: Mapping[str, Given]) -> Run:
        self.num_runs += 1
        times_s = {"start": 2.0, "decode": 0.02 * self.slow}
        noisy = {
            stage: time_s * math.exp(self._draws.gauss(0, self.noise)) for stage, time_s in times_s.items()
        }
        return Run(noisy, {"name": str(options["model"].value) if "model" in options else "embedded"})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scenario = Scripted()
    monkeypatch.setitem(SCENARIOS, "scripted", scenario)
    return scenario


@pytest.fixture
def recorded(scripted: Scripted, tmp_path: Path, capsys: Streams) -> str:
    path = str(tmp_path / "baseline.json")
    assert main(["baseline", "record", path, "--scenario", "scripted"]) == 0
    assert scripted.num_runs == 7
    assert re.search(r"decode +0\.0\d+ +0\.\d% +\+5\.0%", capsys.readouterr().out)
    return path


def test_an_unchanged_machine_passes(recorded: str, scripted: Scripted, capsys: Streams) -> None:
    for _ in range(20):
        assert main(["baseline", "check", recorded]) == 0
    assert "decode: pass" in capsys.readouterr().out
    assert scripted.num_runs == 21 * 7


def test_a_slowdown_fails_and_is_explained(recorded: str, scripted: Scripted, capsys: Streams) -> None:
    scripted.slow = 1.15
    assert main(["baseline", "check", recorded, "--explain", "--runs", "5"]) == 1
    out = capsys.readouterr().out
    assert "old, s (min - max)" in out and "new, s (min - max)" in out
    assert "start: pass" in out and re.search(r"decode: fail: \+1[45]\.\d% of the time, limit \+5\.0%", out)
    assert main(["baseline", "check", recorded, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in printed["stages"]] == ["start", "decode"] and not printed["passed"]


def test_a_noisy_machine_records_nothing(scripted: Scripted, tmp_path: Path, capsys: Streams) -> None:
    scripted.noise = 0.2
    path = tmp_path / "baseline.json"
    assert main(["baseline", "record", str(path), "--scenario", "scripted"]) == 1
    assert "not recorded: start varies by" in capsys.readouterr().err and not path.exists()


def test_another_machine_is_refused_before_anything_is_timed(
    recorded: str, scripted: Scripted, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fingerprints.fingerprint()
    there = {**here, "devices": [{**here["devices"][0], "name": "another processor"}]}
    monkeypatch.setattr(fingerprints, "fingerprint", lambda: there)
    assert main(["baseline", "check", recorded]) == 2
    assert "another processor): record one here" in capsys.readouterr().err
    assert scripted.num_runs == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other.gguf"], "model with name embedded, these runs have other.gguf"),
        (["--threads", "1"], "options with threads None, these runs have 1"),
        (["--scenario", "text"], "holds the scenario scripted, not text"),
        (["--runs", "2"], "--runs"),
    ],
)
def test_a_baseline_of_something_else_is_refused_at_once(
    recorded: str, scripted: Scripted, capsys: Streams, arguments: list[str], message: str
) -> None:
    assert main(["baseline", "check", recorded, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert scripted.num_runs - 7 == (1 if "model with" in message else 0)


def test_bad_usage_of_baselines(tmp_path: Path, capsys: Streams) -> None:
    path = str(tmp_path / "baseline.json")
    for arguments, message in (
        (["record", path, "--scenario", "txt"], "unknown scenario 'txt'; did you mean 'text'"),
        (["record", path, "--runs", "2"], "--runs"),
        (["check", path], "cannot be read"),
        (["record", "/proc/baseline.json"], "cannot be written"),
    ):
        assert main(["baseline", *arguments]) == 2
        assert message in capsys.readouterr().err


class Quiet:
    """Real processes, timed once; every further run takes the same times, `slow` as long. So nothing here is chance."""

    def __init__(self) -> None:
        self._real = TextScenario(
            input_tokens=8, output_tokens=4, num_requests=2, batch_input_tokens=4, repeats=1
        )
        self._taken: Run | None = None
        self.stages = self._real.stages
        self.slow = 1.0

    def describe(self) -> dict[str, int]:
        return self._real.describe()

    def run(self, options: Mapping[str, Given]) -> Run:
        self._taken = self._taken or self._real.run(options)
        return Run(
            {stage: time_s * self.slow for stage, time_s in self._taken.stages.items()}, self._taken.model
        )


def test_a_real_engine_from_its_record_to_its_check(
    tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed gate of this project itself, on the device that computes nothing."""
    quiet = Quiet()
    monkeypatch.setitem(SCENARIOS, "quiet", quiet)
    engine = [str(write_tiny_gguf(tmp_path / "tiny.gguf")), "--device", "null"]
    path = str(tmp_path / "speed.json")
    assert main(["baseline", "record", path, *engine, "--scenario", "quiet"]) == 0
    assert main(["baseline", "check", path, *engine]) == 0
    capsys.readouterr()
    quiet.slow = 1.15
    assert main(["baseline", "check", path, *engine, "--explain"]) == 1
    assert re.findall(r"^(\w+): fail", capsys.readouterr().out, re.MULTILINE) == list(quiet.stages)
