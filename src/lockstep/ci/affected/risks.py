"""What a reviewer should look at first: changes that no test of this machine, or no test at all, can vouch for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from lockstep.ci.affected import layout
from lockstep.ci.affected.graph import BY_NAME, SourceGraph
from lockstep.ci.affected.operators import KernelFacts, kernels_in, maker_of_kernels, mutants_of, tolerance_of
from lockstep.ci.affected.repository import Change, Repository
from lockstep.ci.affected.symbols import parsed, same_code
from lockstep.ci.marks import MarkedFile, MarkError, SuiteMark, read_marks
from lockstep.ci.project import Project

_SKIPS = re.compile(r"(pytest\.)?(mark\.(skip|skipif|xfail)|skip|xfail|importorskip)")
_GATE_COMMAND = re.compile(r"\blockstep\s+(eval|baseline)\b|--(min-accuracy|against)\b")
_NO_KERNEL_CODE = {"__init__.py", "contract.py", "cases.py", "mutants.py"}


@dataclass(frozen=True, slots=True)
class Risk:
    """One line for the reviewer. `kind` is a stable word for programs."""

    kind: str
    path: str
    text: str


def find_risks(repository: Repository, graph: SourceGraph, project: Project) -> list[Risk]:
    """Every risk of the changes of `repository`, kernels first."""
    changes = [each for each in repository.changes if not same_text(repository, each)]
    found = sorted(_kernels(repository, graph, changes), key=lambda risk: not risk.text.endswith("none"))
    for change in changes:
        if layout.is_contract(change.path) or PurePosixPath(change.path).name == "mutants.py":
            found += _contract(change, repository)
        found += _gate(change, repository)
    found += _tests(repository, changes, project)
    return found


def same_text(repository: Repository, change: Change) -> bool:
    """True for a Python file of which only comments, docstrings or the layout changed."""
    if not change.path.endswith(".py") or change.status in ("added", "deleted"):
        return False
    return same_code(repository.before(change), repository.after(change))


def _kernels(repository: Repository, graph: SourceGraph, changes: list[Change]) -> Iterator[Risk]:
    """Kernels whose own file, or another that they compute with, has other code than before.

    Compiled code is reached through the room `native`.
    """
    changed = {change.path: change for change in changes if _may_be_computed_with(change.path)}
    loaders = [path for path in graph.sources if layout.room(path) == "native"]
    starts = [*changed, *(loaders if any(layout.is_compiled(each.path) for each in changes) else ())]
    for path in sorted(filter(layout.is_kernel, graph.dependents(starts, BY_NAME))):
        now = _facts(path, repository.text(path), repository)
        change = changed.get(path)
        before = repository.before(change) if change is not None else repository.text(path)
        old = _facts(path, before, repository)
        for kernel in now.values():
            yield Risk("kernel", path, _kernel_text(kernel, old.get(kernel.provider)))


def _may_be_computed_with(path: str) -> bool:
    return layout.room(path) == "ops" and PurePosixPath(path).name not in _NO_KERNEL_CODE


def _kernel_text(kernel: KernelFacts, old: KernelFacts | None) -> str:
    what = "is new" if old is None else "changed"
    stated = ", ".join(kernel.verified_on) or "none"
    if old is None or not kernel.verified_on:
        return f"kernel {kernel.name} {what}, verified on: {stated}"
    if old.verified_on == kernel.verified_on:
        return f"kernel {kernel.name} {what}, verified on: {stated}, before this change"
    return f"kernel {kernel.name} {what}, verified on: {stated} (was: {', '.join(old.verified_on) or 'none'})"


def _facts(path: str, text: str, repository: Repository) -> dict[str, KernelFacts]:
    """The kernels of a file by provider. Where another module makes them, it says where they were verified."""
    op, provider = layout.operator(path) or "", PurePosixPath(path).stem
    maker = maker_of_kernels(text)
    found = kernels_in(text, op, provider)
    if not found and maker is not None:
        made = kernels_in(repository.text(layout.file_of(maker)), op, provider)
        found = [KernelFacts(op, provider, kernel.verified_on) for kernel in made]
    return {kernel.provider: kernel for kernel in found}


def _contract(change: Change, repository: Repository) -> Iterator[Risk]:
    op, before, after = layout.operator(change.path), repository.before(change), repository.after(change)
    old, new = tolerance_of(before), tolerance_of(after)
    if old and old != new:
        first = (new or "none").splitlines()[0]
        yield Risk(
            "tolerance", change.path, f"contract tolerance of {op} changed: {old.splitlines()[0]} -> {first}"
        )
    for name in sorted(mutants_of(before) - mutants_of(after)):
        yield Risk("mutant", change.path, f"{op} no longer has to reject the known-wrong version {name!r}")


def _gate(change: Change, repository: Repository) -> Iterator[Risk]:
    """A gate or baseline that is not what it was; a new one only makes things stricter."""
    if change.status == "added":
        return
    if layout.is_baseline(change.path) or layout.is_gate(change.path):
        what = "baseline" if layout.is_baseline(change.path) else "gate"
        yield Risk(what, change.path, f"{what} {change.status}: {change.path}")
    elif layout.decides_everything(change.path):
        kept = _gate_lines(repository.after(change))
        for line in _gate_lines(repository.before(change)):
            if line not in kept:
                yield Risk("gate", change.path, f"gate changed or removed in {change.path}: {line}")


def _gate_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if _GATE_COMMAND.search(line)]


def _tests(repository: Repository, changes: list[Change], project: Project) -> Iterator[Risk]:
    touched = [change for change in changes if layout.is_test(change.old_path or change.path)]
    before = {change: _marked(change.path, repository.before(change), project) for change in touched}
    after = {change: _marked(change.path, repository.after(change), project) for change in touched}
    kept = {test for file in after.values() for test in file.tests}
    for change in touched:
        old, new = before[change], after[change]
        for test in old.tests:
            if test not in kept:
                yield Risk("test", change.path, f"test removed: {change.path}::{test}")
            elif test in new.tests:
                for what in _weaker(old.mark_of(test), new.mark_of(test)):
                    yield Risk("test", change.path, f"test {what}: {change.path}::{test}")
        skips = _num_skips(repository.after(change)) - _num_skips(repository.before(change))
        if skips > 0 and change.status != "added":
            yield Risk(
                "test", change.path, f"test disabled: {skips} more skips or expected failures in {change.path}"
            )


def _weaker(old: SuiteMark | None, new: SuiteMark | None) -> Iterator[str]:
    """How a test runs less often than before."""
    if old is None or new is None or old.disabled is not None:
        return
    if new.disabled is not None:
        yield f"disabled ({new.disabled.reason})"
    if old.stage == "per-commit" and new.stage == "nightly":
        yield "moved to nightly"
    for suite in old.suites:
        if suite not in new.suites:
            yield f"taken out of suite {suite}"


def _marked(path: str, text: str, project: Project) -> MarkedFile:
    """A file's tests and marks; none when it has faults, which the registry reports."""
    try:
        return read_marks(path, text, project)
    except MarkError:
        return MarkedFile(path, (), {})


def _num_skips(text: str) -> int:
    tree = parsed(text)
    found = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)) if tree else ()
    return sum(1 for name in found if name.startswith("pytest.") and _SKIPS.fullmatch(name))
