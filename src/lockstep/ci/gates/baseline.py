"""A baseline: the times of one scenario on one machine, and how later times are judged by them.

The file holds times. Limits follow from them whenever they are needed, so that no edited limit can loosen the gate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lockstep.ci.gates.files import write_json
from lockstep.ci.gates.scenarios import Run, Scenario
from lockstep.ci.gates.slowdown import MIN_RUNS, MUST_CATCH, Spread
from lockstep.ci.gates.verdict import Outcome, Verdict
from lockstep.config import Given
from lockstep.core.errors import ConfigError

FORMAT = "lockstep-baseline-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Runs of one scenario on one machine: stage -> seconds of each run."""

    scenario: str
    work: dict[str, Any]
    machine: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    times_s: dict[str, list[float]]

    @property
    def num_runs(self) -> int:
        """Of the stage that was timed least often; 0 without stages."""
        return min(map(len, self.times_s.values()), default=0)

    @property
    def spreads(self) -> dict[str, Spread]:
        return {stage: Spread.of(times_s) for stage, times_s in self.times_s.items()}


class TooWide(ConfigError):
    """The runs of a stage differ so much that a gate on them could let a slow-down pass."""


def measure(
    name: str,
    scenario: Scenario,
    options: Mapping[str, Given],
    *,
    machine: Mapping[str, Any],
    num_runs: int,
    progress: Callable[[int, int], None] | None = None,
    baseline: Measurement | None = None,
) -> Measurement:
    """Runs the scenario so often; `progress` hears how many of how many are done.

    Raises ConfigError as soon as it is known that the runs are of something else than `baseline`.
    """
    if baseline is not None:
        _require_same("work", baseline.work, dict(scenario.describe()))
        _require_same("options", baseline.options, _given(options))
    runs: list[Run] = []
    for number in range(num_runs):
        runs.append(scenario.run(options))
        if baseline is not None:
            _require_same("model", baseline.model, dict(runs[-1].model))
        if progress is not None:
            progress(number + 1, num_runs)
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    return Measurement(
        scenario=name,
        work=dict(scenario.describe()),
        machine=dict(machine),
        model=dict(runs[0].model),
        options=_given(options),
        times_s={stage: [run.stages[stage] for run in runs if stage in run.stages] for stage in stages},
    )


def require_usable(baseline: Measurement, stages: Sequence[str], num_new_runs: int) -> None:
    """Raises ConfigError unless every stage has times, and TooWide unless a slow-down of 15% would be caught."""
    if missing := [stage for stage in stages if len(baseline.times_s.get(stage, ())) < MIN_RUNS]:
        raise ConfigError(
            f"the runs have fewer than {MIN_RUNS} times of {', '.join(missing)}: a stage without them is not guarded"
        )
    for stage, spread in baseline.spreads.items():
        caught = spread.catches(num_new_runs)
        if caught > MUST_CATCH:
            enough = spread.runs_to_catch()
            advice = "quieten the machine" if enough is None else f"use --runs {enough}, or quieten the machine"
            raise TooWide(
                f"{stage} varies by {spread.deviation:.1%} over {spread.num_runs} runs: what is less than "
                f"{caught - 1:.0%} slower could pass, and {MUST_CATCH - 1:.0%} must not; {advice}"
            )


def require_same_machine(baseline: Measurement, machine: Mapping[str, Any]) -> None:
    """Raises ConfigError when the baseline was taken on another machine. Known before anything is timed."""
    then, now = machine_id(baseline.machine), machine_id(machine)
    if then != now:
        raise ConfigError(
            f"the baseline is of machine {then} ({_devices(baseline.machine)}), this is {now} ({_devices(machine)}): "
            "record one here"
        )


@dataclass(frozen=True, slots=True)
class StageVerdict:
    """One stage, then and now. `ratio` is the new median over the old, None where `note` says that one is missing."""

    stage: str
    ratio: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def outcome(self) -> Outcome:
        slow = self.ratio is None or self.limit is None or self.ratio > self.limit
        return "fail" if slow else "pass"

    @property
    def verdict(self) -> Verdict:
        """In words."""
        if self.ratio is None or self.limit is None:
            return Verdict(self.stage, self.outcome, self.note)
        change = f"{self.ratio - 1:+.1%} of the time, limit {self.limit - 1:+.1%}"
        return Verdict(self.stage, self.outcome, f"{change}; {self.note}" if self.note else change)


def judge(baseline: Measurement, new: Measurement) -> list[StageVerdict]:
    """A verdict for each stage of either: slower than its limit fails, and so does one that either lacks.

    Raises ConfigError when they are not of the same work on the same machine.
    """
    require_same_machine(baseline, new.machine)
    for what in ("scenario", "work", "model", "options"):
        _require_same(what, getattr(baseline, what), getattr(new, what))
    return [_judge_stage(stage, baseline, new) for stage in {**baseline.times_s, **new.times_s}]


def _judge_stage(stage: str, baseline: Measurement, new: Measurement) -> StageVerdict:
    if len(new.times_s.get(stage, ())) < MIN_RUNS:
        return StageVerdict(stage, note="missing in the new runs")
    if stage not in baseline.times_s:
        return StageVerdict(stage, note="missing in the baseline: record a new one")
    old, now = Spread.of(baseline.times_s[stage]), Spread.of(new.times_s[stage])
    limit, ratio = old.limit(now.num_runs), now.median_s / old.median_s
    return StageVerdict(
        stage, ratio, limit, "faster: a new baseline would guard it" if ratio < 1 / limit else ""
    )


def machine_id(machine: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits, equal for machines with equal devices and the same kind of host processor; versions
    and load do not count.
    """
    devices = [
        {**device, "memory_bytes": round(device["memory_bytes"] / 2**30)} for device in machine["devices"]
    ]
    facts = [devices, machine.get("processor")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def write_baseline(baseline: Measurement, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    document = {
        "format": FORMAT,
        "machine_id": machine_id(baseline.machine),
        "spread": {stage: msgspec.to_builtins(spread) for stage, spread in baseline.spreads.items()},
        "baseline": msgspec.to_builtins(baseline),
    }
    write_json(document, path)


def read_baseline(path: Path) -> Measurement:
    """Raises ConfigError when the file is no baseline, naming what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path} has the format {document['format']!r}, not {FORMAT!r}: record it anew")
        found = msgspec.convert(document["baseline"], Measurement)
        if not all(0 < time_s < math.inf for times_s in found.times_s.values() for time_s in times_s):
            raise ValueError("times must be positive numbers of seconds")
        machine_id(found.machine)
        return found
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no baseline written by `lockstep baseline record`: {error}") from None


def _devices(machine: Mapping[str, Any]) -> str:
    return ", ".join(str(device["name"]) for device in machine["devices"])


def _given(options: Mapping[str, Given]) -> dict[str, Any]:
    """The options that the user gave; where the model's files lie does not matter."""
    return {option: given.value for option, given in sorted(options.items()) if option != "model"}


def _require_same(what: str, then: Any, now: Any) -> None:
    if then != now:
        raise ConfigError(f"the baseline is of {_difference(what, then, now)}: record a new one")


def _difference(what: str, then: Any, now: Any) -> str:
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"{what} {then}, these runs are of {now}"
    name = next(name for name in {**then, **now} if then.get(name) != now.get(name))
    return f"{what} with {name} {then.get(name)}, these runs have {now.get(name)}"
