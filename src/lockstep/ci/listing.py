"""The registry as rows: its suites, its files, and what is disabled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from lockstep.ci.marks import MarkedFile, SuiteMark
from lockstep.ci.parts import Durations, load_durations, total_s
from lockstep.ci.project import STAGES
from lockstep.ci.registry import Registry


@dataclass(frozen=True, slots=True)
class Listed:
    """One mark of a file. `scope` is the test or class that states it, empty for the file's own."""

    path: str
    scope: str
    mark: SuiteMark
    platforms: tuple[str, ...]
    num_tests: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        mark = self.mark
        return {
            "path": self.path,
            "scope": self.scope,
            "suites": list(mark.suites),
            "platforms": list(self.platforms),
            "stage": mark.stage,
            "needs": list(mark.needs),
            "seconds": mark.seconds,
            "exclusive": mark.exclusive,
            "disabled": mark.disabled is not None,
            "tests": self.num_tests,
        }

    def disabled_json(self, today: date) -> dict[str, Any]:
        """What a disabled mark says, with its age. The mark must be disabled."""
        disabled = self.mark.disabled
        assert disabled is not None
        return {
            "path": self.path,
            "scope": self.scope,
            "suites": list(self.mark.suites),
            "reason": disabled.reason,
            "issue": disabled.issue,
            "since": disabled.since.isoformat(),
            "age_days": (today - disabled.since).days,
        }


def listed(registry: Registry) -> tuple[Listed, ...]:
    """Every mark that counts for at least one test, by file and line."""
    return tuple(row for file in registry.files for row in _rows(registry, file))


def _rows(registry: Registry, file: MarkedFile) -> Iterator[Listed]:
    for mark in file.marks_in_use():
        scope = next(name for name, found in file.marks.items() if found == mark)
        num_tests = sum(file.mark_of(test) == mark for test in file.tests)
        platforms = dict.fromkeys(registry.project.suite(name).platform for name in mark.suites)
        yield Listed(file.path, scope, mark, tuple(platforms), num_tests)


def suite_sizes(registry: Registry) -> list[dict[str, Any]]:
    """Each suite with its platform, devices, and files and seconds in each stage; `unmeasured` counts those of the
    files whose seconds are estimates.
    """
    durations = load_durations(registry.project.durations_path)
    return [_size(registry, name, durations) for name in registry.project.suites]


def suites_without(stage: str, sizes: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the suites that have no test in a stage."""
    return [size["suite"] for size in sizes if not size["stages"][stage]["files"]]


def _size(registry: Registry, name: str, durations: Durations) -> dict[str, Any]:
    suite = registry.project.suite(name)
    stages = {}
    for stage in STAGES:
        jobs = registry.jobs([name], stage, durations)
        unmeasured = sum(durations.get(name, job.target, stage) is None for job in jobs)
        stages[stage] = {"files": len(jobs), "seconds": round(total_s(jobs), 1), "unmeasured": unmeasured}
    return {
        "suite": name,
        "platform": suite.platform,
        "devices": suite.devices,
        "description": suite.description,
        "stages": stages,
    }
