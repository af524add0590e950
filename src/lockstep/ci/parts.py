"""Shares a suite's files out over machines or processes, longest first.

Source of the rule: R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969): each job,
longest first, goes to the part that has least; the longest part is at most 4/3 - 1/(3n) times the best possible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.core.errors import ConfigError

Measured = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Job:
    """The unit that is shared out: all tests of one file in one suite, or a test or class that is exclusive by itself.

    `target` names it to pytest. `exclusive`: nothing runs beside it.
    """

    suite: str
    target: str
    seconds: float
    exclusive: bool = False


@dataclass(slots=True)
class Durations:
    """Seconds that targets of jobs took: suite -> target -> stage."""

    measured: Measured = field(default_factory=dict)

    def get(self, suite: str, target: str, stage: str) -> float | None:
        """Seconds, or None where nothing was measured."""
        return self.measured.get(suite, {}).get(target, {}).get(stage)

    def record(self, suite: str, target: str, stage: str, seconds: float) -> None:
        """Replaces what was known."""
        self.measured.setdefault(suite, {}).setdefault(target, {})[stage] = round(seconds, 2)

    @property
    def num_times(self) -> int:
        """How many there are."""
        return sum(len(stages) for targets in self.measured.values() for stages in targets.values())

    def update(self, newer: Durations) -> None:
        """Takes over what was measured since."""
        for suite, targets in newer.measured.items():
            for target, stages in targets.items():
                for stage, seconds in stages.items():
                    self.record(suite, target, stage, seconds)

    def keep_only(self, targets: Iterable[tuple[str, str]]) -> None:
        """Drops what is not the (suite, target) of a job any more."""
        wanted = set(targets)
        self.measured = {
            suite: {target: stages for target, stages in found.items() if (suite, target) in wanted}
            for suite, found in self.measured.items()
        }

    def save(self, path: Path) -> None:
        """Writes JSON in an order that makes small differences."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.measured, indent=1, sort_keys=True) + "\n", "utf-8")


def load_durations(path: Path) -> Durations:
    """What was saved; nothing where there is no file. Raises ConfigError when it holds something else."""
    if not path.is_file():
        return Durations()
    try:
        found = json.loads(path.read_text("utf-8"))
        measured: Measured = {
            suite: {
                target: {stage: _seconds(seconds) for stage, seconds in stages.items()}
                for target, stages in targets.items()
            }
            for suite, targets in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no durations ({error}); delete it and run with --update-durations"
        ) from error
    return Durations(measured)


def partition(jobs: Iterable[Job], num_parts: int) -> tuple[tuple[Job, ...], ...]:
    """`num_parts` lists that hold every job exactly once, whatever order the jobs came in.

    Raises ConfigError when there are fewer than one part.
    """
    if num_parts < 1:
        raise ConfigError(f"there must be at least 1 part, not {num_parts}")
    parts: list[list[Job]] = [[] for _ in range(num_parts)]
    loads = [0.0] * num_parts
    for job in sorted(jobs, key=lambda job: (-job.seconds, job.suite, job.target)):
        least = min(range(num_parts), key=lambda index: (loads[index], index))
        parts[least].append(job)
        loads[least] += job.seconds
    return tuple(map(tuple, parts))


def pick_part(jobs: Iterable[Job], part_id: int, num_parts: int) -> tuple[Job, ...]:
    """One of the parts. Raises ConfigError when there is no such part."""
    if not 0 <= part_id < num_parts:
        raise ConfigError(f"--partition-id must be from 0 to {num_parts - 1}, not {part_id}")
    return partition(jobs, num_parts)[part_id]


def enough_parts(jobs: Iterable[Job], seconds_per_part: float) -> int:
    """How many parts keep each within `seconds_per_part`, as far as whole jobs allow; at least 1.

    Never more than there are jobs, so no part is empty.
    """
    jobs = tuple(jobs)
    if not math.isfinite(seconds_per_part) or seconds_per_part <= 0:
        raise ConfigError(f"--seconds-per-part must be above 0, not {seconds_per_part}")
    limit = max(seconds_per_part, max((job.seconds for job in jobs), default=0.0))
    for num_parts in range(1, len(jobs)):
        if max(total_s(part) for part in partition(jobs, num_parts)) <= limit:
            return num_parts
    return max(len(jobs), 1)


def total_s(jobs: Iterable[Job]) -> float:
    """Seconds of the jobs, one after another."""
    return sum(job.seconds for job in jobs)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a number of seconds")
    return float(value)
