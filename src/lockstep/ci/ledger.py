"""What is known of each test while a run goes on, written by several lanes."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from lockstep.ci.child import Batch
from lockstep.ci.registry import Registry
from lockstep.ci.results import Attempt, TestResult


class Ledger:
    """Attempts by suite and test, and the reasons of tests that did not run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[tuple[str, str], TestResult] = {}
        self._not_run: dict[tuple[str, str], str] = {}

    def add_batch(self, suite: str, batch: Batch) -> None:
        """Books every first attempt of a process."""
        stages = batch.tests or {}
        with self._lock:
            for test, attempt in batch.attempts.items():
                self._results[suite, test] = TestResult(
                    suite, file_of(test), test, stages.get(test, ""), [attempt]
                )
            for test, reason in {**batch.not_run, **batch.skipped}.items():
                self._not_run[suite, _function(test)] = reason

    def fail(self, suite: str, tests: Iterable[str], text: str) -> None:
        """Books a failure in the place of whatever those tests, or whole files, seemed to have done."""
        with self._lock:
            for test in tests:
                before = self._results.get((suite, test))
                stage = before.stage if before is not None else ""
                attempts = [Attempt("failed", 0.0, text)]
                self._results[suite, test] = TestResult(suite, file_of(test), test, stage, attempts)

    def add_attempt(self, suite: str, test: str, attempt: Attempt) -> None:
        """Books a further attempt."""
        with self._lock:
            self._results[suite, test].attempts.append(attempt)

    def failed(self, *, by_machine: bool) -> dict[str, list[str]]:
        """Tests whose last attempt failed, by suite: those that the machine failed, or all others."""
        found: dict[str, list[str]] = {}
        for (suite, test), result in sorted(self._results.items()):
            last = result.attempts[-1]
            if last.outcome == "failed" and (last.infrastructure is not None) == by_machine:
                found.setdefault(suite, []).append(test)
        return found

    def results_of(self, suite: str) -> list[TestResult]:
        """By test."""
        return [result for (name, _), result in sorted(self._results.items()) if name == suite]

    def not_run(self, registry: Registry, suite: str, stage: str) -> list[tuple[str, str]]:
        """(test, reason) of the suite's disabled tests, of those that need what the device lacks, and of those whose
        file skipped itself."""
        left = []
        for file in registry.files:
            for test in file.tests:
                mark, name = file.mark_of(test), f"{file.path}::{test}"
                if mark is None or suite not in mark.suites:
                    continue
                if mark.disabled is not None:
                    left.append((name, f"disabled since {mark.disabled.since}: {mark.disabled.reason}"))
                elif mark.belongs(suite, stage) and (reason := self._reason(suite, name)) is not None:
                    left.append((name, reason))
        return left

    def _reason(self, suite: str, test: str) -> str | None:
        """Of the test itself, its class or its file."""
        while test:
            if (suite, test) in self._not_run:
                return self._not_run[suite, test]
            test = test.rpartition("::")[0]
        return None


def file_of(test: str) -> str:
    """The file of a test, which its id begins with."""
    return test.partition("::")[0]


def _function(test: str) -> str:
    """The test without its parameters."""
    return test.partition("[")[0]
