"""The two states that are compared: a base commit and the working tree."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lockstep.core.errors import LockstepError

Status = Literal["added", "changed", "deleted", "moved"]

_STATUS: dict[str, Status] = {"A": "added", "D": "deleted", "R": "moved"}


class RepositoryError(LockstepError):
    """Git cannot answer: no repository here, or no such commit."""


@dataclass(frozen=True, slots=True)
class Change:
    """One file that differs. `added` and `removed` count lines, none for a binary file; `old_path` is where a file
    that exists on both sides was in the base."""

    path: str
    status: Status
    added: int = 0
    removed: int = 0
    old_path: str | None = None

    @property
    def weight(self) -> int:
        """Lines that someone has to read."""
        return self.added + self.removed


class Repository:
    """A checkout, compared with the commit where it left `base`.

    What others have done on the base branch since then is not part of the change; what lies in the working tree,
    committed or not, is. Raises RepositoryError when git knows no such commit or the two share no history.
    """

    def __init__(self, root: Path, base: str) -> None:
        self.root = Path(self._git("rev-parse", "--show-toplevel", at=root).strip())
        commit = self._git(
            *("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}"),
            failure=f"no such commit: {base} (a clone without its history has no other)",
        )
        self.base = self._git(
            *("merge-base", commit.strip(), "HEAD"),
            failure=f"{base} and this checkout share no commit (a clone without its history shares none)",
        ).strip()

    @cached_property
    def files(self) -> frozenset[str]:
        """Every file of the working tree that git tracks or would track."""
        listed = self._git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
        return frozenset(path for path in _split(listed) if (self.root / path).is_file())

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Every file that differs from the base, by path."""
        untracked = _split(self._git("ls-files", "-z", "--others", "--exclude-standard"))
        new = [Change(path, "added", added=len(self.text(path).splitlines())) for path in untracked]
        return tuple(sorted([*self._tracked_changes(), *new], key=lambda change: change.path))

    def text(self, path: str) -> str:
        """A file of the working tree; empty when it is not there or is no text."""
        try:
            return (self.root / path).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def base_text(self, path: str | None) -> str:
        """A file as it was in the base; empty when it was not there or is no text."""
        if path is None:
            return ""
        done = subprocess.run(
            ["git", "-C", str(self.root), "show", f"{self.base}:{path}"], capture_output=True, check=False
        )
        try:
            return done.stdout.decode("utf-8")
        except UnicodeDecodeError:
            return ""

    def before(self, change: Change) -> str:
        """The text of a changed file in the base."""
        return "" if change.status == "added" else self.base_text(change.old_path or change.path)

    def after(self, change: Change) -> str:
        """The text of a changed file in the working tree."""
        return "" if change.status == "deleted" else self.text(change.path)

    def _tracked_changes(self) -> Iterator[Change]:
        difference = ("diff", "-z", "--find-renames", "--no-ext-diff", "--ignore-submodules")
        lines: dict[str, tuple[int, int]] = {}
        fields = iter(_split(self._git(*difference, "--numstat", self.base)))
        for field in fields:
            added, removed, path = field.split("\t", 2)
            if not path:
                next(fields)
                path = next(fields)
            lines[path] = (0, 0) if added == "-" else (int(added), int(removed))
        fields = iter(_split(self._git(*difference, "--name-status", self.base)))
        for letter in fields:
            old_path = next(fields)
            path = next(fields) if letter[0] == "R" else old_path
            status = _STATUS.get(letter[0], "changed")
            yield Change(path, status, *lines[path], old_path=old_path if letter[0] == "R" else None)

    def _git(self, *arguments: str, at: Path | None = None, failure: str | None = None) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(at or self.root), *arguments], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise RepositoryError(
                f"git is needed to compare with a base, and does not start: {error}"
            ) from error
        if done.returncode:
            said = done.stderr.strip().removeprefix("fatal: ").splitlines() or ["it failed without a word"]
            raise RepositoryError(failure or f"git {arguments[0]}: {said[0]}")
        return done.stdout


def _split(text: str) -> list[str]:
    return [field for field in text.split("\0") if field]
