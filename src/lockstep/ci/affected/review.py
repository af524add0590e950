"""A change as a reviewer wants to see it: what it is, what it touches, who would notice a fault in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lockstep.ci.affected import layout
from lockstep.ci.affected.graph import BY_NAME, SourceGraph
from lockstep.ci.affected.platforms import Binding
from lockstep.ci.affected.repository import Change, Repository
from lockstep.ci.affected.risks import Risk, find_risks, same_text
from lockstep.ci.affected.symbols import SymbolChange, changed_symbols, public_symbols
from lockstep.ci.project import STAGES, open_project
from lockstep.ci.registry import Registry, load_registry

GATES = {"accuracy": "eval", "speed": "baseline"}
"""What a gate holds to -> the command that runs it; a gate covers what its command needs."""


@dataclass(frozen=True, slots=True)
class TouchedSuite:
    """Test files of one suite that would notice the change, of `num_files` that it has. `stages` of those files."""

    name: str
    stages: tuple[str, ...]
    files: tuple[str, ...]
    num_files: int


@dataclass(frozen=True, slots=True)
class Cover:
    """Who runs a changed file of the package: how many test files, and the nearest with its distance in imports.

    `by_registry`: no chain of names leads to it; a registry loads it with whatever else lies in its folder.
    """

    path: str
    num_tests: int
    nearest: str | None
    steps: int
    by_registry: bool


@dataclass(frozen=True, slots=True)
class Review:
    """Everything about the difference between `base`, a commit, and the working tree.

    `deciding` are changed files that any test may depend on: with one of them, every suite is touched.
    `unnamed` are new public functions and classes that no test uses.
    """

    base: str
    changes: tuple[Change, ...]
    deciding: tuple[str, ...]
    operators: tuple[str, ...]
    models: tuple[str, ...]
    symbols: tuple[SymbolChange, ...]
    unnamed: tuple[SymbolChange, ...]
    suites: tuple[TouchedSuite, ...]
    gates: tuple[str, ...]
    covers: tuple[Cover, ...]
    risks: tuple[Risk, ...]

    @property
    def rooms(self) -> dict[str, list[Change]]:
        """Changes by room, those with most lines first."""
        found: dict[str, list[Change]] = {}
        for change in self.changes:
            found.setdefault(layout.room(change.path), []).append(change)
        return dict(sorted(found.items(), key=lambda item: (-weight(item[1]), item[0])))

    @property
    def untested(self) -> list[Cover]:
        """Changed code that no test runs."""
        return [cover for cover in self.covers if not cover.num_tests]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "base": self.base,
            "rooms": {
                room: {
                    "files": len(changes),
                    "added": sum(each.added for each in changes),
                    "removed": sum(each.removed for each in changes),
                }
                for room, changes in self.rooms.items()
            },
            "changes": [asdict(change) for change in self.changes],
            "everything": list(self.deciding),
            "operators": list(self.operators),
            "models": list(self.models),
            "symbols": [asdict(symbol) for symbol in self.symbols],
            "symbols_no_test_names": [f"{symbol.path}: {symbol.name}" for symbol in self.unnamed],
            "suites": [asdict(suite) for suite in self.suites],
            "gates": list(self.gates),
            "covers": [asdict(cover) for cover in self.covers],
            "untested": [cover.path for cover in self.untested],
            "risks": [asdict(risk) for risk in self.risks],
        }


def weight(changes: Iterable[Change]) -> int:
    """Lines that were added or removed."""
    return sum(change.weight for change in changes)


def review(root: Path, base: str) -> Review:
    """Compares the working tree around `root` with the commit where it left `base`.

    Raises RepositoryError when git has no such commit, RegistryError when a test file belongs to no suite.
    """
    repository = Repository(root, base)
    project = open_project(repository.root)
    registry = load_registry(project)
    registry.require_sound()
    graph = _graph(repository)
    paths = [path for change in repository.changes for path in (change.path, change.old_path) if path]
    deciding = tuple(filter(layout.decides_everything, paths))
    reach = _Reach(registry, graph, Binding(repository.files, repository.text))
    starts = graph.sources if deciding else paths
    symbols = _symbols(repository)
    return Review(
        base=repository.base,
        changes=repository.changes,
        deciding=deciding,
        operators=_operators(graph, paths),
        models=_models(repository, graph, paths),
        symbols=symbols,
        unnamed=_unnamed(graph, symbols),
        suites=_suites(registry, reach, starts),
        gates=_gates(graph.dependents(starts)),
        covers=tuple(
            _cover(graph, change.path, reach)
            for change in repository.changes
            if _is_new_code(repository, change)
        ),
        risks=tuple(find_risks(repository, graph, project)),
    )


def _graph(repository: Repository) -> SourceGraph:
    """The working tree, with what was deleted as it was: who still names a deleted file is touched by that."""
    sources = {path: repository.text(path) for path in repository.files if path.endswith(".py")}
    for change in repository.changes:
        gone = change.old_path or (change.path if change.status == "deleted" else None)
        if gone is not None and gone.endswith(".py") and not layout.is_test(gone):
            sources[gone] = repository.base_text(gone)
    return SourceGraph(sources, repository.files)


def _symbols(repository: Repository) -> tuple[SymbolChange, ...]:
    return tuple(
        symbol
        for change in repository.changes
        if layout.is_package_code(change.path)
        for symbol in changed_symbols(change.path, repository.before(change), repository.after(change))
    )


def _unnamed(graph: SourceGraph, symbols: Iterable[SymbolChange]) -> tuple[SymbolChange, ...]:
    named = {name for path in graph.tests_code for name in graph.names_in(path)}
    return tuple(symbol for symbol in symbols if symbol.is_new_definition and symbol.name not in named)


def _operators(graph: SourceGraph, paths: Iterable[str]) -> tuple[str, ...]:
    found = {layout.operator(path) for path in graph.dependents(paths, BY_NAME)}
    return tuple(sorted(name for name in found if name in graph.operators))


def _models(repository: Repository, graph: SourceGraph, paths: Iterable[str]) -> tuple[str, ...]:
    touched = graph.dependents(paths, BY_NAME)
    found = {
        name for path in touched if (name := layout.model(path)) and _has_architectures(repository.text(path))
    }
    return tuple(sorted(found))


def _has_architectures(text: str) -> bool:
    """True for a file with a class that says which architectures it is, so not for what models share."""
    return any(
        name.endswith(".architectures") and (signature == "constant" or " = " in signature)
        for name, signature in public_symbols(text).items()
    )


class _Reach:
    """What changed files touch, and where. A kernel that a platform cannot bind touches there who names its file or,
    in words, its provider.
    """

    def __init__(self, registry: Registry, graph: SourceGraph, binding: Binding) -> None:
        suites = registry.project.suites
        self._graph = graph
        self._binding = binding
        self._platforms = {
            file.path: {suites[name].platform for mark in file.marks_in_use() for name in mark.suites}
            for file in registry.files
        }

    def touched_on(self, platform: str, paths: Iterable[str]) -> set[str]:
        """Every file that changes of `paths` touch there."""
        paths = set(paths)
        foreign = {path for path in paths if not self._binding.can_bind(platform, path)}
        found = set(self._graph.dependents(paths - foreign))
        found.update(self._graph.dependents(foreign, ("named", "read")))
        return found.union(*(self._by_hand(path) for path in foreign))

    def able(self, tests: Iterable[str], path: str) -> set[str]:
        """Those of `tests` that run where what a file offers can be bound, or that pick it by hand."""
        return self._by_hand(path).union(
            test
            for test in tests
            if any(self._binding.can_bind(platform, path) for platform in self._platforms.get(test, ()))
        )

    def _by_hand(self, path: str) -> set[str]:
        """Tests that pick kernels by their provider's name, as those do which interpret them."""
        if not layout.is_kernel(path):
            return set()
        offered = self._binding.offered_by(path)
        picking = [
            other
            for other in self._graph.dependents([path])
            if layout.is_tests_code(other) and not offered.isdisjoint(self._graph.texts_in(other))
        ]
        return set(self._graph.dependents(picking))


def _gates(touched: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name, command in GATES.items() if layout.command(command) in touched)


def _suites(registry: Registry, reach: _Reach, paths: Iterable[str]) -> tuple[TouchedSuite, ...]:
    found = []
    for name, suite in registry.project.suites.items():
        touched = reach.touched_on(suite.platform, paths)
        marks = {
            file.path: [mark for mark in file.marks_in_use() if mark.belongs(name, "all")]
            for file in registry.files
        }
        members = {path: own for path, own in marks.items() if own}
        files = tuple(path for path in members if path in touched)
        if files:
            used = {mark.stage for path in files for mark in members[path]}
            found.append(
                TouchedSuite(name, tuple(stage for stage in STAGES if stage in used), files, len(members))
            )
    return tuple(found)


def _is_new_code(repository: Repository, change: Change) -> bool:
    is_code = layout.is_package_code(change.path) and change.status != "deleted"
    return is_code and not same_text(repository, change)


def _cover(graph: SourceGraph, path: str, reach: _Reach) -> Cover:
    """A test that names the file covers it wherever it runs; one that a registry leads there does where its platform
    can bind what the file offers.
    """
    named = _tests_in(graph.dependents([path], ("named",)))
    bound = _tests_in(graph.dependents([path], BY_NAME))
    loaded = _tests_in(graph.dependents([path], (*BY_NAME, "loaded")))
    counted = named.keys() | reach.able(loaded, path)
    bound, loaded = ({test: far for test, far in found.items() if test in counted} for found in (bound, loaded))
    steps = bound or loaded
    room = layout.room(path)
    nearest = min(steps, key=lambda test: (steps[test], f"/{room}/" not in test, test), default=None)
    distance = 0 if nearest is None else steps[nearest]
    return Cover(path, len(loaded), nearest, distance, by_registry=bool(loaded) and not bound)


def _tests_in(steps: dict[str, int]) -> dict[str, int]:
    return {path: count for path, count in steps.items() if layout.is_test(path)}
