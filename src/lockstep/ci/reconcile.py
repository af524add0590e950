"""Holds what pytest collected against what the registry lists: a test that only one of them knows would be lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lockstep.ci.child import Batch
from lockstep.ci.ledger import file_of
from lockstep.ci.marks import MarkedFile
from lockstep.ci.registry import Registry


def lost_tests(registry: Registry, targets: Sequence[str], batch: Batch, *, filtered: bool) -> dict[str, str]:
    """File to what is wrong with it, of a process that was given `targets` and has collected.

    Wrong are tests that are listed and were not collected, tests that were collected and are not listed, and tests
    that something dropped without a word. `filtered`: pytest's own filter dropped some, as was asked.
    """
    found: dict[str, set[str]] = {}
    for test in batch.found.values():
        path, _, name = test.partition("::")
        found.setdefault(path, set()).add(name)
    wrong: dict[str, list[str]] = {}
    for path in dict.fromkeys(map(file_of, targets)):
        file = registry.file(path)
        if file is None or path in batch.broken or path in batch.skipped:
            continue
        scopes = [_scope(target) for target in targets if file_of(target) == path]
        wrong[path] = list(_differences(file, scopes, found.get(path, set()), batch))
    if not filtered:
        accounted = {*(batch.tests or ()), *batch.not_run, *batch.later}
        for test in batch.found.keys() - accounted:
            wrong.setdefault(file_of(test), []).append(f"{test} was collected, and a hook dropped it")
    return {path: "\n".join(sorted(texts)) for path, texts in wrong.items() if texts}


def _differences(file: MarkedFile, scopes: Sequence[str], found: set[str], batch: Batch) -> Iterator[str]:
    for test in file.tests:
        is_explained = any(_is_below(f"{file.path}::{test}", path) for path in batch.skipped)
        is_wanted = any(_is_below(test, scope) for scope in scopes)
        if is_wanted and not is_explained and not any(_is_below(name, test) for name in found):
            yield f"{file.path}::{test} is listed, and pytest did not collect it"
    for name in found:
        if not file.knows(name):
            yield f"{file.path}::{name} was collected, and the text of the file does not show it"


def _scope(target: str) -> str:
    """What a target names in its file, without parameters; empty for the whole file."""
    return target.partition("::")[2].partition("[")[0]


def _is_below(test: str, scope: str) -> bool:
    return not scope or test == scope or test.startswith(f"{scope}::")
