"""A run's results on disk: what is known stays, whatever becomes of the process that measures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UNFINISHED = "its process ended while it ran"


class Record:
    """A run's JSON at `path`, rewritten at each change and never half written; one that is there is continued.

    `head` says what the run is. `tests` in the content has an entry for every test that began.
    """

    def __init__(self, path: Path, **head: Any) -> None:
        self._path = path
        self.content: dict[str, Any] = {**head, "tests": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())

    def begin(self, test: str) -> None:
        """Notes that the test began: should its process die, that is what is known of it."""
        self.content["tests"][test] = {"error": UNFINISHED}
        self.save()

    def put(self, test: str, figures: dict[str, Any]) -> None:
        """Notes what came of a test, and prints it in brief."""
        self.content["tests"][test] = figures
        self.save()
        print("RESULT", test, json.dumps(brief(figures)), flush=True)

    def missing(self, tests: Sequence[str]) -> list[str]:
        """Those that never began."""
        return [test for test in tests if test not in self.content["tests"]]

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(scratch, self._path)


def brief(figures: dict[str, Any]) -> dict[str, Any]:
    """What fits on a line: measured numbers, shortened, counters, and why there are none."""
    found: dict[str, Any] = {key: figures[key] for key in ("error", "skipped") if key in figures}
    for key, value in figures.items():
        if isinstance(value, float):
            found[key] = float(f"{value:.4g}")
        elif key.startswith("num_"):
            found[key] = value
        elif isinstance(value, dict):
            found[key] = brief(value)
    return found
