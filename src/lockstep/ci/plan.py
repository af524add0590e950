"""Which files a run takes: the parts of each suite, and their times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lockstep.ci.parts import Durations, Job, enough_parts, load_durations, partition, pick_part, total_s
from lockstep.ci.registry import Registry


@dataclass(frozen=True, slots=True)
class SuitePlan:
    """One suite's files in one stage, shared out. No parts: the suite has no test in this stage.

    `seconds` of a part are those of its files one after another; `suites run` works on several at once.
    """

    suite: str
    stage: str
    parts: tuple[tuple[Job, ...], ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each part."""
        return tuple(map(total_s, self.parts))

    def as_json(self) -> dict[str, Any]:
        """For programs, such as a workflow that makes one job of each part."""
        return {
            "suite": self.suite,
            "stage": self.stage,
            "total_partitions": len(self.parts),
            "seconds": round(sum(self.seconds), 1),
            "parts": [
                {
                    "partition_id": number,
                    "seconds": round(total_s(part), 1),
                    "files": [job.target for job in part],
                }
                for number, part in enumerate(self.parts)
            ],
        }


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 0, of `total`."""

    number: int
    total: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The jobs of a run, and the suites that must show a result."""

    suites: tuple[str, ...]
    jobs: tuple[Job, ...]


def plan_suite(
    registry: Registry, suite: str, stage: str, *, num_parts: int | None = None, seconds_per_part: float = 600.0
) -> SuitePlan:
    """Shares out a suite over `num_parts` parts, or over as many as keep each within `seconds_per_part`.

    Raises RegistryError when a test belongs nowhere, ConfigError for an unknown suite or an impossible number.
    """
    registry.require_sound()
    jobs = registry.jobs([suite], stage, load_durations(registry.project.durations_path))
    if not jobs:
        return SuitePlan(suite, stage, ())
    if num_parts is None:
        num_parts = enough_parts(jobs, seconds_per_part)
    return SuitePlan(suite, stage, partition(jobs, num_parts))


def select_jobs(
    registry: Registry, suites: Iterable[str], stage: str, durations: Durations, part: Part | None = None
) -> Selection:
    """The jobs of suites, or of that part of each of them.

    A suite with no test at all stays among those that must show a result; one whose tests are in other parts does not.
    """
    registry.require_sound()
    expected: list[str] = []
    selected: list[Job] = []
    for suite in dict.fromkeys(suites):
        jobs = registry.jobs([suite], stage, durations)
        mine = jobs if part is None else pick_part(jobs, part.number, part.total)
        selected += mine
        if mine or not jobs:
            expected.append(suite)
    return Selection(tuple(expected), tuple(selected))
