"""Runs jobs in pytest processes: side by side in lanes, then the exclusive ones alone, then what is owed once more."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lockstep.bench.fingerprint import fingerprint
from lockstep.ci.child import Batch, Child
from lockstep.ci.ledger import Ledger, file_of
from lockstep.ci.machine import missing_devices
from lockstep.ci.parts import Durations, Job, load_durations, partition
from lockstep.ci.plan import Part, Selection, select_jobs
from lockstep.ci.project import EVERY_STAGE
from lockstep.ci.reconcile import lost_tests
from lockstep.ci.registry import Registry
from lockstep.ci.reports import DURATIONS_NAME, write_reports
from lockstep.ci.results import Attempt, RunReport, SuiteReport, TestResult
from lockstep.core.errors import ConfigError

Result = TypeVar("Result")

MOST_RETRIES = 2
"""Of a test that the machine failed."""
MOST_CONFIRMED = 10
"""Failures that run once more to tell the flaky from the broken; where there are more of them, none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run. `num_lanes` processes work side by side. `keyword` is pytest's `-k`."""

    suites: tuple[str, ...]
    stage: str
    report_dir: Path
    part: Part | None = None
    num_lanes: int = 1
    keyword: str | None = None
    continue_on_error: bool = False
    timeout_per_test_s: float | None = None
    flaky_budget: int = 0
    update_durations: bool = False


class Show(Protocol):
    """Told of every file whose tests have ended, from several threads."""

    def __call__(self, suite: str, path: str, attempts: Sequence[Attempt]) -> None: ...


def run(registry: Registry, options: RunOptions, show: Show) -> RunReport:
    """Runs suites, writes the reports into the report folder and, if asked, the durations into the project.

    Raises RegistryError when a test belongs nowhere, ConfigError for an unknown suite or part, a wrong filter, a report
    folder that cannot be written, or where there is no pytest. An interrupt (KeyboardInterrupt) is raised once the
    reports are written.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError('running suites needs pytest: pip install -e ".[test]"')
    if options.update_durations and options.keyword is not None:
        raise ConfigError("--update-durations measures whole files; leave out -k")
    if options.keyword is not None:
        check_keyword(options.keyword)
    project = registry.project
    durations = load_durations(project.durations_path)
    selection = select_jobs(registry, options.suites, options.stage, durations, options.part)
    report = Runner(registry, options, show).run(selection)
    write_reports(report, options.report_dir)
    is_whole = options.keyword is None and not report.stopped
    found = measured_durations(report, registry) if is_whole else Durations()
    found.save(options.report_dir / DURATIONS_NAME)
    if report.interrupted:
        raise KeyboardInterrupt
    if options.update_durations:
        durations.update(found)
        jobs = registry.jobs(project.suites, EVERY_STAGE, durations)
        durations.keep_only((job.suite, job.target) for job in jobs)
        durations.save(project.durations_path)
    return report


def check_keyword(text: str) -> None:
    """Raises ConfigError when pytest would refuse the filter, which it says only once it has collected everything."""
    from _pytest.mark.expression import Expression

    try:
        Expression.compile(text)
    except Exception as error:  # Its type differs from one version of pytest to the next.
        raise ConfigError(f"-k {text!r} is no filter: {getattr(error, 'msg', error)}") from None


class Runner:
    """One run of jobs; call `run` once."""

    def __init__(self, registry: Registry, options: RunOptions, show: Show) -> None:
        self._registry = registry
        self._project = registry.project
        self._options = options
        self._show = show
        self._logs = options.report_dir.resolve() / "logs"
        self._stop_file = self._logs / "stop"
        self._ledger = Ledger()
        self._children: list[Child] = []
        self._is_interrupted = False

    def run(self, selection: Selection) -> RunReport:
        """Runs every job whose suite this machine can run, and reports on each suite of the selection."""
        options, ledger = self._options, self._ledger
        machine, begin_s = fingerprint(), time.monotonic()
        self._make_room()
        missing = {name: missing_devices(self._project.suite(name)) for name in selection.suites}
        stopped = False
        try:
            jobs = [job for job in selection.jobs if missing[job.suite] is None]
            self._run_jobs(jobs if options.keyword is None else self._matching(jobs, options.keyword))
            stopped = self._stopped
            self._retry_infrastructure()
            self._confirm_failures()
        except KeyboardInterrupt:
            stopped = self._is_interrupted = True
        finally:
            for child in self._children:
                child.end()
            self._stop_file.unlink(missing_ok=True)
        reports = [
            SuiteReport(
                name, reason, ledger.results_of(name), ledger.not_run(self._registry, name, options.stage)
            )
            for name, reason in missing.items()
        ]
        return RunReport(
            reports,
            options.stage,
            time.monotonic() - begin_s,
            options.flaky_budget,
            stopped,
            self._is_interrupted,
            machine,
        )

    def _make_room(self) -> None:
        """Events of an earlier run would be read as this run's."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            self._stop_file.unlink(missing_ok=True)
            for pattern in ("*.log", "*.jsonl"):
                for path in self._logs.glob(pattern):
                    path.unlink()
        except OSError as error:
            raise ConfigError(f"--report-dir {self._options.report_dir} cannot be written: {error}") from None

    def _matching(self, jobs: Sequence[Job], keyword: str) -> list[Job]:
        """The jobs in which the filter finds a test, by one collection of all their files.

        What cannot be collected stays: running it says why.
        """
        found: list[Job] = []
        for suite in dict.fromkeys(job.suite for job in jobs):
            mine = [job for job in jobs if job.suite == suite]
            files = sorted({file_of(job.target) for job in mine})
            child = self._child(f"collect-{suite}", suite, ["--collect-only", "-k", keyword, *files])
            batch = self._in_thread(partial(child.run, lambda event, batch: None))
            self._ledger.add_batch(suite, batch)
            if batch.tests is None or batch.ending is not None:
                found += mine
                continue
            wanted = {self._registry.target_of(test) for test in batch.tests}
            found += [job for job in mine if job.target in wanted or file_of(job.target) in batch.broken]
        return found

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        lanes = partition([job for job in jobs if not job.exclusive], self._options.num_lanes)
        self._together([partial(self._run_lane, f"lane{number}", lane) for number, lane in enumerate(lanes)])
        for number, job in enumerate(job for job in jobs if job.exclusive):
            self._in_thread(partial(self._run_targets, f"alone{number}", job.suite, [job.target]))

    def _together(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """Works side by side, in threads. An interrupt reaches the thread that waits: it ends the processes of the
        others, which book what was done by then.
        """
        with ThreadPoolExecutor(len(works)) as pool:
            working = [pool.submit(work) for work in works]
            try:
                return [each.result() for each in working]
            except BaseException as error:
                self._is_interrupted = isinstance(error, KeyboardInterrupt)
                self._stop_file.touch()
                for child in self._children:
                    child.end()
                raise

    def _in_thread(self, work: Callable[[], Result]) -> Result:
        (result,) = self._together([work])
        return result

    def _run_lane(self, name: str, jobs: Sequence[Job]) -> None:
        """One process for each suite of the lane; files in the order in which pytest alone would take them."""
        ordered = sorted(jobs, key=lambda job: (job.suite, job.target))
        for suite, group in groupby(ordered, key=lambda job: job.suite):
            self._run_targets(f"{name}-{suite}", suite, [job.target for job in group], "--without-exclusive")

    def _run_targets(self, name: str, suite: str, targets: Sequence[str], *options: str) -> None:
        """Runs targets; when a process dies, the tests that it did not reach get another one."""
        arguments = list(options)
        if not self._goes_on:
            arguments += ["--suite-stop-file", str(self._stop_file)]
        if self._options.keyword is not None:
            arguments += ["-k", self._options.keyword]
        number = 0
        while targets and not self._stopped:
            child = self._child(f"{name}-{number}", suite, [*arguments, *targets])
            batch = child.run(partial(self._follow, suite))
            self._ledger.add_batch(suite, batch)
            targets = self._settle(suite, batch, targets, child)
            number += 1

    def _settle(self, suite: str, batch: Batch, targets: Sequence[str], child: Child) -> list[str]:
        """Books what went wrong beside the tests themselves; returns the tests that are still owed a process."""
        for path, text in batch.broken.items():
            self._fail(suite, [path], text)
        if self._is_interrupted:
            self._fail(suite, [batch.running] if batch.running else [], "the run was interrupted")
            return []
        if batch.tests is None:
            if batch.ending is not None:
                how = f"{batch.ending} before it had collected its tests"
                self._fail(suite, targets, f"{how}\n{child.log_tail()}")
            return []
        filtered = self._options.keyword is not None
        for path, text in lost_tests(self._registry, targets, batch, filtered=filtered).items():
            self._fail(suite, [path], text)
        if batch.ending is None:
            if not self._stopped:
                self._fail(suite, batch.unfinished, "the test process ended before this test did")
            return []
        blamed = batch.running or next(reversed(batch.attempts), None)
        if blamed is None:
            self._fail(suite, targets, f"{batch.ending} before its first test\n{child.log_tail()}")
            return []
        self._fail(suite, [blamed], f"{batch.ending} during or after this test\n{child.log_tail()}")
        return [test for test in batch.unfinished if test != blamed]

    def _retry_infrastructure(self) -> None:
        """Tests that the machine failed get up to two more attempts, in fresh processes."""
        for number in range(1, MOST_RETRIES + 1):
            self._run_again(f"retry{number}", self._ledger.failed(by_machine=True))

    def _confirm_failures(self) -> None:
        """A failed test runs once more. Passing then makes it flaky, never passed: its first attempt stays."""
        failed = self._ledger.failed(by_machine=False)
        if sum(map(len, failed.values())) <= MOST_CONFIRMED:
            self._run_again("confirm", failed)

    def _run_again(self, name: str, failed: dict[str, list[str]]) -> None:
        """One process for the tests of a suite, and one for each job that is exclusive."""
        for suite, tests in failed.items():
            groups: dict[str, list[str]] = {}
            for test in tests:
                if "::" in test:
                    alone = self._registry.is_exclusive(test)
                    groups.setdefault(self._registry.target_of(test) if alone else "", []).append(test)
            for number, group in enumerate(groups.values()):
                self._in_thread(partial(self._attempt_again, f"{name}-{suite}-{number}", suite, group))

    def _attempt_again(self, name: str, suite: str, tests: Sequence[str]) -> None:
        child = self._child(name, suite, tests)
        batch = child.run(lambda event, batch: None)
        for test in tests:
            attempt = batch.attempts.get(test)
            if attempt is None or test == batch.running:
                attempt = Attempt("failed", 0.0, f"{batch.ending or 'not found again'}\n{child.log_tail()}")
            self._ledger.add_attempt(suite, test, attempt)

    def _child(self, name: str, suite: str, arguments: Sequence[str]) -> Child:
        options = ["--stage", self._options.stage]
        if self._options.timeout_per_test_s is not None:
            options += ["--timeout-per-test", str(self._options.timeout_per_test_s)]
        child = Child(self._project.root, self._logs, name, suite, [*options, *arguments])
        self._children.append(child)
        return child

    def _follow(self, suite: str, event: dict[str, Any], batch: Batch) -> None:
        """Shows a file when its last test has ended."""
        if event["event"] != "ended":
            return
        path = file_of(event["test"])
        mates = [test for test in batch.tests or () if file_of(test) == path]
        if all(test in batch.attempts for test in mates):
            self._show(suite, path, [batch.attempts[test] for test in mates])

    def _fail(self, suite: str, tests: Sequence[str], text: str) -> None:
        if tests:
            self._ledger.fail(suite, tests, text)
            if not self._goes_on:
                self._stop_file.touch()

    @property
    def _goes_on(self) -> bool:
        """A budget of flaky tests says nothing before the failures were run again, so it goes on as well."""
        return self._options.continue_on_error or self._options.flaky_budget > 0

    @property
    def _stopped(self) -> bool:
        return self._stop_file.exists()


def measured_durations(report: RunReport, registry: Registry) -> Durations:
    """The seconds of each job whose tests all passed at once, by stage."""
    durations = Durations()
    by_job: dict[tuple[str, str], list[TestResult]] = {}
    for result in report.results:
        by_job.setdefault((result.suite, registry.target_of(result.test)), []).append(result)
    for (suite, target), results in by_job.items():
        if all(result.status in ("passed", "skipped") for result in results):
            for stage in sorted({result.stage for result in results}):
                seconds = sum(result.seconds for result in results if result.stage == stage)
                durations.record(suite, target, stage, seconds)
    return durations
