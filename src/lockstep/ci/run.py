"""Runs jobs in pytest processes: side by side in lanes, then the exclusive ones alone, then what is owed once more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from lockstep.bench.fingerprint import fingerprint
from lockstep.ci.child import Batch, Child
from lockstep.ci.ledger import Ledger, file_of
from lockstep.ci.machine import missing_devices
from lockstep.ci.parts import Durations, Job, load_durations, partition
from lockstep.ci.plan import Part, Selection, select_jobs
from lockstep.ci.project import EVERY_STAGE, Project
from lockstep.ci.registry import Registry
from lockstep.ci.reports import write_reports
from lockstep.ci.results import Attempt, RunReport, SuiteReport, TestResult
from lockstep.core.errors import ConfigError

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

    Raises RegistryError when a test belongs nowhere, ConfigError for an unknown suite or part.
    """
    if options.update_durations and options.keyword is not None:
        raise ConfigError("--update-durations measures whole files; leave out -k")
    project = registry.project
    durations = load_durations(project.durations_path)
    selection = select_jobs(registry, options.suites, options.stage, durations, options.part)
    report = Runner(project, options, show).run(registry, selection)
    write_reports(report, options.report_dir)
    if options.update_durations:
        record_durations(report, registry, durations)
        durations.save(project.durations_path)
    return report


class Runner:
    """One run of jobs; call `run` once."""

    def __init__(self, project: Project, options: RunOptions, show: Show) -> None:
        self._project = project
        self._options = options
        self._show = show
        self._logs = options.report_dir.resolve() / "logs"
        self._stop_file = self._logs / "stop"
        self._ledger = Ledger()
        self._children: list[Child] = []

    def run(self, registry: Registry, selection: Selection) -> RunReport:
        """Runs every job whose suite this machine can run, and reports on each suite of the selection."""
        options, ledger = self._options, self._ledger
        machine, begin_s = fingerprint(), time.monotonic()
        self._make_room()
        missing = {name: missing_devices(self._project.suite(name)) for name in selection.suites}
        try:
            self._run_jobs([job for job in selection.jobs if missing[job.suite] is None])
            stopped = self._stopped
            self._retry_infrastructure()
            self._confirm_failures()
        finally:
            for child in self._children:
                child.end()
            self._stop_file.unlink(missing_ok=True)
        reports = [
            SuiteReport(name, reason, ledger.results_of(name), ledger.not_run(registry, name, options.stage))
            for name, reason in missing.items()
        ]
        wall_s = time.monotonic() - begin_s
        return RunReport(reports, options.stage, wall_s, options.flaky_budget, stopped, machine)

    def _make_room(self) -> None:
        """Events of an earlier run would be read as this run's."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._stop_file.unlink(missing_ok=True)
        for pattern in ("*.log", "*.jsonl"):
            for path in self._logs.glob(pattern):
                path.unlink()

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        lanes = partition([job for job in jobs if not job.exclusive], self._options.num_lanes)
        with ThreadPoolExecutor(len(lanes)) as pool:
            working = [pool.submit(self._run_lane, f"lane{number}", lane) for number, lane in enumerate(lanes)]
            try:
                for each in working:
                    each.result()
            except BaseException:
                self._stop_file.touch()
                for child in self._children:
                    child.end()
                raise
        for number, job in enumerate(job for job in jobs if job.exclusive):
            self._run_targets(f"alone{number}", job.suite, [job.target])

    def _run_lane(self, name: str, jobs: Sequence[Job]) -> None:
        """One process for each suite of the lane; files in the order in which pytest alone would take them."""
        ordered = sorted(jobs, key=lambda job: (job.suite, job.target))
        for suite, group in groupby(ordered, key=lambda job: job.suite):
            self._run_targets(f"{name}-{suite}", suite, [job.target for job in group], "--without-exclusive")

    def _run_targets(self, name: str, suite: str, targets: Sequence[str], *options: str) -> None:
        """Runs targets; when a process dies, the tests that it did not reach get another one."""
        arguments = list(options)
        if not self._options.continue_on_error:
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
        if batch.ending is None:
            if not self._stopped:
                self._fail(suite, batch.unfinished, "the test process ended before this test did")
            return []
        if batch.tests is None:
            self._fail(suite, targets, f"{batch.ending} before it had collected its tests\n{child.log_tail()}")
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
        for suite, targets in failed.items():
            tests = [test for test in targets if "::" in test]
            if not tests:
                continue
            child = self._child(f"{name}-{suite}", suite, tests)
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
            if not self._options.continue_on_error:
                self._stop_file.touch()

    @property
    def _stopped(self) -> bool:
        return self._stop_file.exists()


def record_durations(report: RunReport, registry: Registry, durations: Durations) -> None:
    """Keeps the seconds of each job whose tests all passed at once, by stage; forgets jobs that no longer exist."""
    by_job: dict[tuple[str, str], list[TestResult]] = {}
    for result in report.results:
        by_job.setdefault((result.suite, registry.target_of(result.test)), []).append(result)
    for (suite, target), results in by_job.items():
        if all(result.status in ("passed", "skipped") for result in results):
            for stage in sorted({result.stage for result in results}):
                seconds = sum(result.seconds for result in results if result.stage == stage)
                durations.record(suite, target, stage, seconds)
    every = registry.jobs(registry.project.suites, EVERY_STAGE, durations)
    durations.keep_only((job.suite, job.target) for job in every)
