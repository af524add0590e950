"""The pytest plugin: takes the tests of one suite, limits their time, and writes what happens as lines of JSON.

It does nothing in a project whose pyproject.toml has no [tool.lockstep.testing]. Without `--suite` it takes every test
that this machine can run, so that a plain `pytest` works; what it leaves out is said at the end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import pytest

from lockstep.ci.infrastructure import infrastructure_failure
from lockstep.ci.machine import missing_capability, missing_devices
from lockstep.ci.marks import KEYWORDS, MarkedFile, MarkError, SuiteMark, read_marks
from lockstep.ci.project import STAGE_CHOICES, STAGES, Project, find_project
from lockstep.core.errors import LockstepError

GRACE_S = 20.0
"""From the end of a test's time, which raises in the test, to the end of the process, which code in C cannot ignore."""


UNEXPECTED = "expected to fail, and passed: take the mark away"
"""What is said of a test with a mark xfail that is out of date; pytest alone would call it passed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suites", "suites of tests (lockstep suites run)")
    group.addoption("--suite", metavar="NAME", help="Take only the tests of this suite.")
    group.addoption("--stage", choices=STAGE_CHOICES, default=STAGES[0], help="Which tests of a suite to take.")
    group.addoption(
        "--without-exclusive",
        action="store_true",
        help="Leave out tests and classes that are exclusive by themselves.",
    )
    group.addoption("--timeout-per-test", type=float, metavar="S", help="Seconds that one test may take.")
    group.addoption("--suite-events", metavar="FILE", help="Append what happens to FILE, a line of JSON each.")
    group.addoption(
        "--suite-stop-file", metavar="FILE", help="Make FILE after a failure; start no test once it exists."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"suite(name, ..., {', '.join(f'{word}=' for word in KEYWORDS)}): the suites of a test"
    )
    name = config.getoption("--suite")
    try:
        project = find_project(config.rootpath)
        if project is None:
            if name is not None:
                raise pytest.UsageError(
                    f"--suite: no [tool.lockstep.testing] in {config.rootpath}/pyproject.toml"
                )
            return
        picker = Picker(project, name, config.getoption("--stage"), config.getoption("--without-exclusive"))
    except LockstepError as error:
        raise pytest.UsageError(str(error)) from error
    plugin = SuitePlugin(picker)
    config.pluginmanager.register(plugin, "lockstep-suite-picker")
    limit_s = config.getoption("--timeout-per-test")
    limit_s = project.settings.seconds_per_test if limit_s is None else limit_s
    config.pluginmanager.register(TimeLimit(limit_s), "lockstep-suite-time-limit")
    events = config.getoption("--suite-events")
    if events is not None:
        watch = Watch(picker, plugin, Path(events), config.getoption("--suite-stop-file"))
        config.pluginmanager.register(watch, "lockstep-suite-watch")


class Picker:
    """Says of each test whether it runs here, in which suites, and why not."""

    def __init__(
        self, project: Project, suite: str | None, stage: str, without_exclusive: bool = False
    ) -> None:
        self.project = project
        self.suites = [project.suite(suite)] if suite is not None else list(project.suites.values())
        self.stage = stage
        self.is_named = suite is not None
        self._without_exclusive = without_exclusive
        self._files: dict[Path, MarkedFile | None] = {}

    def mark_of(self, path: Path, test: str) -> SuiteMark | None:
        """The mark of a test of a file ("TestA::test_b"), read from the text like the registry reads it."""
        file = self._file(path)
        return file.mark_of(test) if file is not None else None

    def comes_later(self, path: Path, test: str) -> bool:
        """True for what runs in a process of its own, when this process is the one for the others."""
        file = self._file(path)
        return self._without_exclusive and file is not None and file.target_of(test) != file.path

    def _file(self, path: Path) -> MarkedFile | None:
        if path not in self._files:
            where = (
                path.relative_to(self.project.root).as_posix() if path.is_relative_to(self.project.root) else ""
            )
            self._files[path] = read_marks(where, path.read_text("utf-8"), self.project) if where else None
        return self._files[path]

    def platforms(self, mark: SuiteMark) -> list[str]:
        """Platforms of the mark's suites that are wanted and can be used here, each once."""
        wanted = [suite for suite in self.suites if suite.name in mark.suites]
        usable = [suite.platform for suite in wanted if missing_devices(suite) is None]
        return [
            name for name in dict.fromkeys(usable) if not mark.needs or not missing_capability(name, mark.needs)
        ]

    def refusal(self, mark: SuiteMark) -> str | None:
        """Why a test with this mark is not taken; None when it is."""
        wanted = [suite for suite in self.suites if suite.name in mark.suites]
        if mark.disabled is not None:
            return f"disabled since {mark.disabled.since}: {mark.disabled.reason} ({mark.disabled.issue})"
        if not wanted:
            return "belongs to other suites"
        if not mark.belongs(wanted[0].name, self.stage):
            return f"belongs to stage {mark.stage}"
        missing = [f"suite {suite.name} {reason}" for suite in wanted if (reason := missing_devices(suite))]
        if len(missing) == len(wanted):
            return "; ".join(missing)
        if self.platforms(mark):
            return None
        usable = [suite for suite in wanted if missing_devices(suite) is None]
        return "; ".join(str(missing_capability(suite.platform, mark.needs)) for suite in usable)


class SuitePlugin:
    """Takes the selected tests and leaves out the others, saying why; `later` are those that another process takes."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker
        self.left_out: dict[str, str] = {}
        self.later: list[str] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "suite_platform" not in metafunc.fixturenames:
            return
        scopes = [metafunc.cls.__name__] if metafunc.cls is not None else []
        mark = self._mark(
            Path(metafunc.module.__file__ or ""), "::".join([*scopes, metafunc.function.__name__])
        )
        platforms = self._picker.platforms(mark) if mark is not None else []
        # A test without a platform is left out below, with the reason; pytest would call it skipped.
        metafunc.parametrize("suite_platform", platforms or ["none"], scope="session")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        taken: list[pytest.Item] = []
        left: list[pytest.Item] = []
        for item in items:
            mark = self._mark(item.path, test_name(item))
            if mark is None and self._picker.is_named:
                raise pytest.UsageError(f"{item.nodeid} belongs to no suite; `lockstep suites list` says more")
            reason = self._picker.refusal(mark) if mark is not None else None
            if reason is not None:
                self.left_out[item.nodeid] = reason
            elif self._picker.comes_later(item.path, test_name(item)):
                self.later.append(item.nodeid)
            else:
                taken.append(item)
                continue
            left.append(item)
        items[:] = taken
        if left:
            config.hook.pytest_deselected(items=left)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for reason, number in Counter(self.left_out.values()).items():
            terminalreporter.write_line(f"{number} not run: {reason}")

    def _mark(self, path: Path, test: str) -> SuiteMark | None:
        try:
            return self._picker.mark_of(path, test)
        except MarkError as error:
            raise pytest.UsageError(str(error)) from error


class TimeLimit:
    """Ends a test that takes longer than `seconds`, and the process when the test cannot be ended.

    Set-up, call and tear-down have that time each; so have the collection and the end of the session.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # pytest puts its own file in the place of stderr while a test runs, and a process that is ended loses it.
        self._stderr = os.fdopen(os.dup(sys.__stderr__.fileno()), "w") if sys.__stderr__ is not None else None
        self._guard_process()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        def end(number: int, frame: FrameType | None) -> None:
            pytest.fail(f"took longer than {self._seconds:g} s")

        self._guard_process()
        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _guard_process(self) -> None:
        if self._stderr is not None:
            faulthandler.dump_traceback_later(self._seconds + GRACE_S, exit=True, file=self._stderr)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        with self._limited():
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with self._limited():
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        with self._limited():
            yield

    def pytest_sessionfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Watch:
    """Writes what happens: one JSON object a line, flushed, so that a process that dies leaves its last words.

    {"event": "collected", "found": {id: test}, "tests": {id: stage}, "not_run": {id: reason}, "later": [id]}, then for
    each test "started", one "phase" for its set-up, call and tear-down, "ended"; "broken" for a file that cannot be
    collected, "skipped" for one that skips itself, "finished" last. `found` is everything that pytest collected, by
    its id, in the registry's words.
    """

    def __init__(self, picker: Picker, choice: SuitePlugin, path: Path, stop_file: str | None) -> None:
        self._picker = picker
        self._choice = choice
        self._found: dict[str, str] = {}
        self._stream: TextIO = path.open("a", encoding="utf-8")
        self._stop_file = Path(stop_file) if stop_file is not None else None

    def _write(self, event: str, **facts: Any) -> None:
        self._stream.write(json.dumps({"event": event, **facts}) + "\n")
        self._stream.flush()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("broken", path=report.nodeid, text=str(report.longrepr))
        elif report.skipped:
            self._write("skipped", path=report.nodeid, text=_why_skipped(report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._found = {item.nodeid: f"{item.nodeid.partition('::')[0]}::{test_name(item)}" for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        tests = {}
        for item in session.items:
            mark = self._picker.mark_of(item.path, test_name(item))
            tests[item.nodeid] = mark.stage if mark is not None else STAGES[0]
        choice = self._choice
        self._write("collected", found=self._found, tests=tests, not_run=choice.left_out, later=choice.later)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("started", test=nodeid)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome: Any = yield
        report: pytest.TestReport = outcome.get_result()
        if report.passed and hasattr(report, "wasxfail"):
            report.outcome, report.longrepr = "failed", UNEXPECTED
        kind = None
        if report.failed and call.excinfo is not None:
            loading = self._picker.project.settings.loading
            kind = infrastructure_failure(call.excinfo.value, loading)
        self._write(
            "phase",
            test=item.nodeid,
            phase=report.when,
            outcome=report.outcome,
            seconds=report.duration,
            text=_text(report),
            infrastructure=kind,
        )
        if self._stop_file is not None:
            if report.failed and kind is None:
                self._stop_file.touch()
            if self._stop_file.exists():
                item.session.shouldstop = "a test failed"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write("ended", test=nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write("finished", code=int(exitstatus))
        self._stream.close()


def test_name(item: pytest.Item) -> str:
    """The test in the words of a mark's scope: classes and function, without parameters."""
    function = getattr(item, "originalname", None) or item.name
    classes = [node.name for node in item.listchain() if isinstance(node, pytest.Class)]
    return "::".join([*classes, function])


test_name.__test__ = False  # type: ignore[attr-defined]


def _text(report: pytest.TestReport) -> str:
    """Why it failed, with what it printed; or why it was skipped."""
    if report.passed:
        return ""
    if report.skipped:
        wasxfail = getattr(report, "wasxfail", None)
        if wasxfail is not None:
            return f"expected to fail: {wasxfail}"
        return _why_skipped(report)
    return "\n".join([report.longreprtext, *(f"--- {title}\n{text}" for title, text in report.sections)])


def _why_skipped(report: pytest.CollectReport | pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
