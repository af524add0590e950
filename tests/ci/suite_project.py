"""Small projects with suites, and runs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

from lockstep.ci.project import open_project
from lockstep.ci.registry import Registry, load_registry
from lockstep.ci.results import Attempt, RunReport, TestResult
from lockstep.ci.run import RunOptions, run

PYPROJECT = """
    [tool.pytest.ini_options]
    testpaths = ["tests"]

    [tool.lockstep.testing]
    seconds_per_test = 30
    loading = ["loader"]

    [tool.lockstep.testing.capabilities]
    fp8 = "8-bit floats"

    [tool.lockstep.testing.suites.cpu]
    platform = "cpu"

    [tool.lockstep.testing.suites.cpu-2]
    platform = "cpu"
    devices = 2

    [tool.lockstep.testing.suites.sim]
    platform = "sim"

    [tool.lockstep.testing.suites.null]
    platform = "null"
"""

MARKED = 'import pytest\n\npytestmark = pytest.mark.suite("cpu")\n'


def make_project(root: Path, files: Mapping[str, str], *, suites: Sequence[str] | None = None) -> Registry:
    """Writes files below `root`/tests (those that name no suite get "cpu") and reads their registry.

    `suites`: of those above, all when None.
    """
    head, *tables = dedent(PYPROJECT).split("[tool.lockstep.testing.suites.")
    wanted = [table for table in tables if suites is None or table.partition("]")[0] in suites]
    (root / "pyproject.toml").write_text("[tool.lockstep.testing.suites.".join([head, *wanted]))
    for name, text in files.items():
        path = root / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = dedent(text)
        is_complete = "mark.suite" in text or not path.name.startswith("test_")
        path.write_text(text if is_complete else f"{MARKED}\n{text}")
    return load_registry(open_project(root))


def run_project(registry: Registry, *suites: str, **options: Any) -> RunReport:
    """One run of a project, with its report in `report` below it."""
    settings: dict[str, Any] = {"stage": "per-commit", "report_dir": registry.project.root / "report"}
    chosen = RunOptions(suites=suites or ("cpu",), **settings | options)
    return run(registry, chosen, _show_nothing)


def by_test(report: RunReport) -> dict[str, TestResult]:
    """Results by the function's name, with parameters."""
    return {result.test.rpartition("::")[2]: result for result in report.results}


def statuses(report: RunReport) -> dict[str, str]:
    """Status by the function's name."""
    return {name: result.status for name, result in by_test(report).items()}


def _show_nothing(suite: str, path: str, attempts: Sequence[Attempt]) -> None:
    """Nobody is looking."""
