"""What a run of suites found: attempts, tests, suites, and the exit code that follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "skipped"]
Status = Literal["passed", "recovered", "flaky", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("passed", "recovered", "flaky", "failed", "skipped")

GREEN, RED, NOTHING_RAN = 0, 1, 5


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of one test, set-up and tear-down included. `infrastructure` says what the machine did, if it did."""

    outcome: Outcome
    seconds: float
    text: str = ""
    infrastructure: str | None = None


@dataclass(slots=True)
class TestResult:
    """All attempts of one test, in order. `test` is pytest's node id, which begins with `path`."""

    __test__ = False

    suite: str
    path: str
    test: str
    stage: str
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """recovered: only the machine failed, and then the test passed. flaky: the test failed, and then it passed."""
        last = self.attempts[-1].outcome
        earlier = [attempt for attempt in self.attempts[:-1] if attempt.outcome == "failed"]
        if last != "passed" or not earlier:
            # A test that fails and then skips itself has still failed.
            return "failed" if earlier else last
        return "recovered" if all(attempt.infrastructure for attempt in earlier) else "flaky"

    @property
    def seconds(self) -> float:
        """Of all attempts together."""
        return sum(attempt.seconds for attempt in self.attempts)


@dataclass(slots=True)
class SuiteReport:
    """One suite of a run. `missing`: why this machine cannot run it. `not_run`: (test, reason)."""

    name: str
    missing: str | None = None
    results: list[TestResult] = field(default_factory=list)
    not_run: list[tuple[str, str]] = field(default_factory=list)

    @property
    def counts(self) -> Counter[Status]:
        """Tests by status."""
        return Counter(result.status for result in self.results)

    @property
    def ran(self) -> bool:
        """True when a test of it passed or failed: skipping all of them is no result."""
        return any(result.status != "skipped" for result in self.results)

    @property
    def verdict(self) -> str:
        """A word for people."""
        if self.missing is not None:
            return "cannot run here"
        if self.counts["failed"]:
            return "failed"
        if not self.ran:
            return "nothing ran"
        return "flaky" if self.counts["flaky"] else "passed"


@dataclass(slots=True)
class RunReport:
    """One call of `suites run`. `stopped` says that tests were left out, because another one failed or, where it is
    `interrupted`, because somebody ended the run."""

    suites: list[SuiteReport]
    stage: str
    wall_s: float
    flaky_budget: int = 0
    stopped: bool = False
    interrupted: bool = False
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def num_flaky(self) -> int:
        return sum(suite.counts["flaky"] for suite in self.suites)

    @property
    def exit_code(self) -> int:
        """1: a test failed, more were flaky than the budget allows, or the run was cut short. 5: a suite ran no test.

        0 only when every suite ran at least one test and no test failed.
        """
        if self.stopped or any(suite.counts["failed"] for suite in self.suites):
            return RED
        if self.num_flaky > self.flaky_budget:
            return RED
        return GREEN if self.suites and all(suite.ran for suite in self.suites) else NOTHING_RAN

    @property
    def cut_short(self) -> str | None:
        """Why tests were left out, or None."""
        if self.interrupted:
            return "Interrupted: other tests were left out."
        return "Stopped after the first failure: other tests were left out." if self.stopped else None

    @property
    def results(self) -> list[TestResult]:
        """Every test, suite after suite."""
        return [result for suite in self.suites for result in suite.results]
