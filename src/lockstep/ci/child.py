"""One pytest process: starts it, reads what it says while it runs, and tells what came of every test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.ci.results import Attempt

POLL_S = 0.1
LOG_LINES_SHOWN = 40
_ENDED_WELL = (0, 1, 2, 5)
"""pytest's codes for: all passed, some failed, stopped early, nothing collected."""


@dataclass(slots=True)
class Batch:
    """What one process did. `tests` maps what was selected to its stage, and is None when it did not get that far.

    `found` maps everything that pytest collected to the registry's name of the test, `later` is left to processes of
    its own. `broken` maps files that could not be collected to the reason, `skipped` those that skipped themselves.
    `ending` says how the process ended, if badly.
    """

    tests: dict[str, str] | None = None
    found: dict[str, str] = field(default_factory=dict)
    later: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    running: str | None = None
    code: int | None = None
    ending: str | None = None

    @property
    def unfinished(self) -> list[str]:
        """Collected tests that did not end."""
        return [test for test in self.tests or () if test not in self.attempts or test == self.running]

    def take(self, event: dict[str, Any]) -> None:
        """Adds one line that the process wrote."""
        kind = event["event"]
        if kind == "collected":
            self.tests, self.not_run = event["tests"], event["not_run"]
            self.found, self.later = event["found"], event["later"]
        elif kind == "skipped":
            self.skipped[event["path"]] = event["text"]
        elif kind == "broken":
            self.broken[event["path"]] = event["text"]
        elif kind == "started":
            self.running = event["test"]
        elif kind == "phase":
            phase = Attempt(event["outcome"], event["seconds"], event["text"], event["infrastructure"])
            before = self.attempts.get(event["test"])
            self.attempts[event["test"]] = phase if before is None else _joined(before, phase)
        elif kind == "ended":
            self.running = None
        elif kind == "finished":
            self.code = event["code"]


def _joined(before: Attempt, then: Attempt) -> Attempt:
    """Two phases of one attempt: the worse decides, and of two failures the machine's excuses only itself."""
    seconds = before.seconds + then.seconds
    if before.outcome == then.outcome == "failed":
        kind = before.infrastructure if then.infrastructure else None
        return Attempt("failed", seconds, f"{before.text}\n{then.text}", kind)
    worse = max(before, then, key=lambda phase: ("passed", "skipped", "failed").index(phase.outcome))
    return replace(worse, seconds=seconds)


class Child:
    """A pytest process for tests of one suite. `name` names its log and its events in `folder`."""

    def __init__(self, root: Path, folder: Path, name: str, suite: str, arguments: Sequence[str]) -> None:
        self.log = folder / f"{name}.log"
        self._events = folder / f"{name}.jsonl"
        self._command = [sys.executable, "-m", "pytest", "-p", "lockstep.ci.plugin", "-p", "no:cacheprovider"]
        self._command += ["-q", "--continue-on-collection-errors", "--suite", suite]
        self._command += ["--suite-events", str(self._events), *arguments]
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False

    def run(self, on_event: Callable[[dict[str, Any], Batch], None]) -> Batch:
        """Runs to the end and calls `on_event` after each event, with what is known by then.

        Processes that the tests left behind in this one's group are ended too.
        """
        batch = Batch()
        self._events.touch()
        with self.log.open("wb") as log, self._events.open(encoding="utf-8") as events:
            self._process = subprocess.Popen(
                self._command, cwd=self._root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            if self._is_ended:
                self._end_group()
            while True:
                ended = self._process.poll() is not None
                for event in _complete_lines(events):
                    batch.take(event)
                    on_event(event, batch)
                if ended:
                    break
                time.sleep(POLL_S)
        self._end_group()
        batch.ending = self._how_it_ended(self._process.returncode, batch)
        return batch

    def end(self) -> None:
        """Ends the process and what it started, now or as soon as it starts."""
        self._is_ended = True
        if self._process is not None and self._process.poll() is None:
            self._end_group()
            self._process.wait()

    def _end_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """The last lines that the process wrote."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES_SHOWN:])

    def _how_it_ended(self, code: int, batch: Batch) -> str | None:
        if code == batch.code and code in _ENDED_WELL:
            return None
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with code {code}"
        return f"the test process ended {how}"


def _complete_lines(stream: Any) -> Iterator[dict[str, Any]]:
    """The events that have been written to their end."""
    while True:
        start = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(start)
            return
        yield json.loads(line)
