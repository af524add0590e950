"""The registry of tests: every test file of a project with the suites that it states."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lockstep.ci.marks import MarkedFile, MarkError, SuiteMark, read_marks
from lockstep.ci.parts import Durations, Job
from lockstep.ci.project import STAGES, Project
from lockstep.core.errors import ConfigError, LockstepError

PROBLEMS_SHOWN = 3
DEFAULT_SECONDS = 5.0
"""Of marks that neither a run nor their author has given a duration."""


class RegistryError(LockstepError):
    """Tests that belong nowhere, or marks that are wrong: nothing is run or planned before they are put right."""


@dataclass(frozen=True, slots=True)
class Registry:
    """The test files of `project`, by path. `problems` has one line for everything that is wrong."""

    project: Project
    files: tuple[MarkedFile, ...]
    problems: tuple[str, ...]

    def require_sound(self) -> None:
        """Raises RegistryError naming the first problems, when there are any."""
        if self.problems:
            more = len(self.problems) - PROBLEMS_SHOWN
            tail = [f"and {more} more (`lockstep suites list` shows them all)"] if more > 0 else []
            raise RegistryError("\n".join([*self.problems[:PROBLEMS_SHOWN], *tail]))

    def file(self, path: str) -> MarkedFile | None:
        """The test file at a path relative to the root."""
        return next((each for each in self.files if each.path == path), None)

    def target_of(self, test: str) -> str:
        """The target of the job that a test, named by pytest's node id, belongs to."""
        path, _, name = test.partition("::")
        file = self.file(path)
        return file.target_of(name.partition("[")[0]) if file is not None else path

    def is_exclusive(self, test: str) -> bool:
        """True when nothing may run beside a test, named by pytest's node id."""
        path, _, name = test.partition("::")
        file = self.file(path)
        mark = file.mark_of(name.partition("[")[0]) if file is not None else None
        return mark is not None and mark.exclusive

    def jobs(self, suites: Iterable[str], stage: str, durations: Durations) -> tuple[Job, ...]:
        """One job for each suite and file that has tests of that suite in that stage, and one for each test or class
        of it that is exclusive by itself. Raises ConfigError for an unknown suite.
        """
        found: list[Job] = []
        for suite in dict.fromkeys(suites):
            self.project.suite(suite)
            for file in self.files:
                found += _jobs(file, suite, stage, durations)
        return tuple(found)


def load_registry(project: Project) -> Registry:
    """Reads every file below the project's test folders; imports none.

    Tests that pytest would not collect, for their file's name or place, are problems too: they would run nowhere.
    """
    files, problems = [], [f"{path} lies in no test folder (testpaths)" for path in _outside(project)]
    for path in _python_files(project):
        where = path.relative_to(project.root).as_posix()
        try:
            file = read_marks(where, path.read_text("utf-8"), project)
        except MarkError as error:
            problems.append(str(error))
        except UnicodeDecodeError as error:
            problems.append(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
        else:
            if _is_test_file(path.name, project):
                files.append(file)
                problems += _unmarked(file)
            else:
                problems += _uncollected(file)
    return Registry(project, tuple(files), tuple(problems))


def _python_files(project: Project) -> list[Path]:
    found: set[Path] = set()
    for name in project.test_folders:
        folder = project.root / name
        if not folder.is_dir():
            raise ConfigError(f"test folder {name!r} of {project.root} does not exist (see testpaths)")
        found.update(
            path
            for path in folder.rglob("*.py")
            if not any(part.startswith(".") for part in path.relative_to(project.root).parts)
        )
    return sorted(found)


def _is_test_file(name: str, project: Project) -> bool:
    return any(fnmatch(name, pattern) for pattern in project.file_patterns)


def _outside(project: Project) -> list[str]:
    """Files named like tests that lie elsewhere, of all that git tracks or would; none where there is no git."""
    command = ["git", "-C", str(project.root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    folders = tuple(f"{name.strip('/')}/" for name in project.test_folders)
    return [
        path
        for path in listed.split("\0")
        if path.endswith(".py")
        and not path.startswith(folders)
        and _is_test_file(path.rpartition("/")[2], project)
        and (project.root / path).is_file()
    ]


def _uncollected(file: MarkedFile) -> list[str]:
    """Of a file whose name is no test's: helpers may have names and bases like tests, but no tests."""
    own = [test for test in file.tests if test not in file.inheriting and ("::" in test or "test_" in test)]
    return [f"{file.path} defines {own[0]}, but pytest does not collect files of this name"] if own else []


def _unmarked(file: MarkedFile) -> list[str]:
    if not file.marks:
        return [f'{file.path} belongs to no suite; state one: pytestmark = pytest.mark.suite("NAME")']
    if not file.tests:
        return [f"{file.path} states a suite but its text shows no test; define some, or import them by name"]
    homeless = [test for test in file.tests if file.mark_of(test) is None]
    return [f"{file.path}: {test} belongs to no suite; mark it or the whole file" for test in homeless]


def _jobs(file: MarkedFile, suite: str, stage: str, durations: Durations) -> Iterator[Job]:
    marks: dict[str, dict[int, SuiteMark]] = {}
    for test in file.tests:
        mark = file.mark_of(test)
        if mark is not None and mark.belongs(suite, stage):
            marks.setdefault(file.target_of(test), {})[mark.line] = mark
    for target, found in marks.items():
        seconds = 0.0
        for part in STAGES:
            estimates = [_estimate(mark) for mark in found.values() if mark.stage == part]
            measured = durations.get(suite, target, part) if estimates else None
            seconds += sum(estimates) if measured is None else measured
        yield Job(suite, target, seconds, any(mark.exclusive for mark in found.values()))


def _estimate(mark: SuiteMark) -> float:
    return DEFAULT_SECONDS if mark.seconds is None else mark.seconds
