"""Baselines of scenarios whose times are known: what is recorded, refused, passed and caught."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gate_model import write_tiny_gguf

from lockstep.ci.gates.baseline import (
    Measurement,
    TooWide,
    judge,
    machine_id,
    measure,
    read_baseline,
    require_same_machine,
    require_usable,
    write_baseline,
)
from lockstep.ci.gates.scenarios import Run, TextScenario, scenario_named
from lockstep.config import Given
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu", seconds=6)

STAGES = {"start": 2.0, "prefill": 0.3, "decode": 0.02, "throughput": 4.0}
HOST = {"name": "a processor", "memory_bytes": 2**34, "num_devices": 1, "features": ["avx2"]}
MACHINE: dict[str, Any] = {"devices": [HOST], "os": "Linux", "load_average": 0.0}
OPTIONS = {"model": Given("a.gguf", "command line"), "threads": Given(2, "command line")}


@dataclasses.dataclass
class Scripted:
    """Takes the times of STAGES with noise; `factors` slow stages down."""

    draws: random.Random = dataclasses.field(default_factory=lambda: random.Random(1))
    noise: float = 0.01
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    leaves_out: str = ""
    stages: tuple[str, ...] = tuple(STAGES)
    model: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "tiny", "dtype": "float32"})

    def describe(self) -> dict[str, Any]:
        return {"input_tokens": 8}

    def run(self, options: Mapping[str, Given]) -> Run:
        times_s = {
            stage: STAGES[stage] * self.factors.get(stage, 1.0) * math.exp(self.draws.gauss(0, self.noise))
            for stage in self.stages
            if stage != self.leaves_out
        }
        return Run(times_s, self.model)


def taken(scenario: Any = None, *, num_runs: int = 5, machine: dict[str, Any] = MACHINE) -> Measurement:
    return measure("scripted", scenario or Scripted(), OPTIONS, machine=machine, num_runs=num_runs)


def failed(baseline: Measurement, new: Measurement) -> set[str]:
    return {found.stage for found in judge(baseline, new) if found.outcome == "fail"}


def test_runs_are_kept_stage_by_stage() -> None:
    heard: list[tuple[int, int]] = []
    found = measure(
        "scripted",
        Scripted(noise=0.0),
        OPTIONS,
        machine=MACHINE,
        num_runs=3,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert found.times_s == {stage: [time_s] * 3 for stage, time_s in STAGES.items()}
    assert found.num_runs == 3 and found.options == {"threads": 2} and found.work == {"input_tokens": 8}
    assert heard == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("seed", range(5))
def test_twenty_unchanged_checks_pass_and_each_slow_stage_is_caught(seed: int) -> None:
    print(f"seed {seed}")
    draws = random.Random(seed)
    baseline = taken(Scripted(draws))
    require_usable(baseline, tuple(STAGES), 5)
    for _ in range(20):
        assert failed(baseline, taken(Scripted(draws))) == set()
    for stage in STAGES:
        assert failed(baseline, taken(Scripted(draws, factors={stage: 1.15}))) == {stage}


def test_a_faster_stage_passes_and_is_named() -> None:
    (fast,) = (
        found for found in judge(taken(), taken(Scripted(factors={"decode": 0.8}))) if found.stage == "decode"
    )
    assert fast.outcome == "pass" and "faster: a new baseline would guard it" in fast.verdict.reason


def test_a_missing_stage_fails() -> None:
    assert failed(taken(), taken(Scripted(leaves_out="decode"))) == {"decode"}
    assert failed(taken(Scripted(leaves_out="decode")), taken()) == {"decode"}
    with pytest.raises(ConfigError, match="fewer than 3 times of decode"):
        require_usable(taken(Scripted(leaves_out="decode")), tuple(STAGES), 5)


def test_a_stage_that_some_runs_lack_fails() -> None:
    new = taken()
    new.times_s["prefill"] = new.times_s["prefill"][:2]
    assert failed(taken(), new) == {"prefill"}


def test_a_wide_spread_is_refused_with_the_runs_that_would_do() -> None:
    """A tolerance so wide that nothing fails is no gate."""
    wide = taken(Scripted(noise=0.04))
    with pytest.raises(TooWide, match=r"varies by .* over 5 runs: .*15% must not; use --runs \d+"):
        require_usable(wide, tuple(STAGES), 5)
    with pytest.raises(TooWide, match="must not; quieten the machine"):
        require_usable(taken(Scripted(noise=0.5)), tuple(STAGES), 5)


def test_a_check_of_too_few_runs_is_refused() -> None:
    """The same baseline serves a check of nine runs, but three would have to be far apart to mean anything."""
    times_s = [math.exp(0.0115 * step) for step in range(-4, 5)]
    baseline = dataclasses.replace(taken(), times_s={"start": times_s})
    require_usable(baseline, ("start",), 9)
    with pytest.raises(TooWide, match=r"start varies by 3\.1% over 9 runs"):
        require_usable(baseline, ("start",), 3)


def other(name: str, value: Any) -> Callable[[Measurement], Measurement]:
    return lambda found: dataclasses.replace(found, **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other("model", {"name": "tiny", "dtype": "bfloat16"}), "model with dtype float32, .* have bfloat16"),
        (other("options", {}), "options with threads 2, these runs have None"),
        (other("work", {"input_tokens": 9}), "work with input_tokens 8"),
        (other("scenario", "text"), "scenario scripted, these runs are of text"),
        (other("machine", {"devices": [{**HOST, "name": "another"}]}), r"\(a processor\), this is .*another"),
    ],
)
def test_times_of_something_else_are_refused(
    change: Callable[[Measurement], Measurement], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        judge(taken(), change(taken()))


def test_a_machine_is_its_devices() -> None:
    """Not its load, its versions or a few bytes that the kernel keeps."""
    same = {"devices": [{**HOST, "memory_bytes": 2**34 - 4096}], "os": "Linux 6", "load_average": 3.0}
    require_same_machine(taken(), same)
    for name, value in (("features", []), ("num_devices", 2), ("memory_bytes", 2**35), ("name", "x")):
        assert machine_id({"devices": [{**HOST, name: value}]}) != machine_id(MACHINE)
    assert machine_id({"devices": [HOST, HOST]}) != machine_id(MACHINE)


def test_a_baseline_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(taken(), path)
    assert read_baseline(path) == taken()
    document = json.loads(path.read_text())
    assert document["machine_id"] == machine_id(MACHINE)
    assert document["spread"]["start"]["num_runs"] == 5 and document["spread"]["start"]["deviation"] > 0


def test_limits_cannot_be_edited_into_a_file(tmp_path: Path) -> None:
    """They are computed from the times; what is written of the spread is for readers."""
    path = tmp_path / "baseline.json"
    write_baseline(taken(), path)
    document = json.loads(path.read_text())
    document["spread"]["decode"] |= {"deviation": 9.0, "limit": 9.0}
    path.write_text(json.dumps(document))
    assert failed(read_baseline(path), taken(Scripted(factors={"decode": 1.15}))) == {"decode"}
    document["baseline"]["times_s"]["decode"] = [0.01, 0.02, 0.04, 0.02, 0.03]
    path.write_text(json.dumps(document))
    with pytest.raises(TooWide):
        require_usable(read_baseline(path), tuple(STAGES), 5)


@pytest.mark.parametrize(
    "times_s", [{"start": [1.0, -1.0, 1.0]}, {"start": [0.0]}, {"start": ["fast"]}, {"start": None}, []]
)
def test_a_spoilt_file_is_refused(tmp_path: Path, times_s: Any) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(taken(), path)
    document = json.loads(path.read_text())
    document["baseline"]["times_s"] = times_s
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is no baseline"):
        read_baseline(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for text in ("{", "[]", "{}", '{"format": "lockstep-baseline-0"}', '{"format": "lockstep-baseline-1"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"baseline\.json"):
            read_baseline(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_baseline(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_baseline(taken(), path / "baseline.json")
    write_baseline(taken(), tmp_path / "new" / "folder" / "baseline.json")


def test_an_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown scenario 'texts'; did you mean 'text'"):
        scenario_named("texts")


def test_a_real_run_has_every_stage(tmp_path: Path) -> None:
    """In real processes, on the device that computes nothing."""
    scenario = TextScenario(input_tokens=8, output_tokens=4, num_requests=2, batch_input_tokens=4, repeats=1)
    options = {"model": str(write_tiny_gguf(tmp_path / "tiny.gguf")), "device": "null"}
    found = scenario.run({name: Given(value, "command line") for name, value in options.items()})
    assert tuple(found.stages) == scenario.stages
    assert all(0 < time_s < 60 for time_s in found.stages.values())
    assert found.stages["start"] > found.stages["prefill"]
    assert found.model["architecture"] == "LlamaForCausalLM" and found.model["name"] == "tiny"


class Sleeping:
    """Real time: sleeps through its stages, `factor` times as long in the last."""

    stages = ("prefill", "decode")

    def __init__(self, factor: float = 1.0) -> None:
        self._sleeps_s = {"prefill": 0.03, "decode": 0.03 * factor}

    def describe(self) -> dict[str, Any]:
        return {}

    def run(self, options: Mapping[str, Given]) -> Run:
        return Run({stage: self._slept(sleep_s) for stage, sleep_s in self._sleeps_s.items()}, {})

    def _slept(self, sleep_s: float) -> float:
        begin_s = time.perf_counter()
        time.sleep(sleep_s)
        return time.perf_counter() - begin_s


def recorded_in_a_quiet_moment() -> Measurement:
    """As a person would record: again, when something disturbed the machine."""
    for _ in range(10):
        baseline = taken(Sleeping(), num_runs=7)
        try:
            require_usable(baseline, Sleeping.stages, 7)
        except TooWide as refused:
            print(refused)
            continue
        return baseline
    raise AssertionError("the machine was never quiet")


@pytest.mark.suite("cpu", stage="nightly", seconds=10, exclusive=True)
def test_on_a_real_clock() -> None:
    baseline = recorded_in_a_quiet_moment()
    for _ in range(20):
        assert failed(baseline, taken(Sleeping(), num_runs=7)) == set()
    assert failed(baseline, taken(Sleeping(1.15), num_runs=7)) == {"decode"}
