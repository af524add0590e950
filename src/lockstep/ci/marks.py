"""Reads suite marks from the text of a test file, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from fnmatch import fnmatch
from typing import Any

from lockstep.ci.project import STAGES, Project, Stage
from lockstep.core.errors import LockstepError, nearest

KEYWORDS = ("seconds", "stage", "needs", "exclusive", "disabled", "issue", "since")
_DISABLING = ("disabled", "issue", "since")

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class MarkError(LockstepError):
    """A suite mark is wrong, misplaced or not written in literals; the text names file and line."""


@dataclass(frozen=True, slots=True)
class Disabled:
    """Why a test runs nowhere, where that is discussed, and since when."""

    reason: str
    issue: str
    since: date


@dataclass(frozen=True, slots=True)
class SuiteMark:
    """One `pytest.mark.suite(...)`. `seconds` is None where no estimate is given."""

    suites: tuple[str, ...]
    line: int
    seconds: float | None = None
    stage: Stage = "per-commit"
    needs: tuple[str, ...] = ()
    exclusive: bool = False
    disabled: Disabled | None = None

    def belongs(self, suite: str, stage: str) -> bool:
        """True when what is marked runs in that suite and stage ("all" takes both stages)."""
        return suite in self.suites and stage in (self.stage, "all") and self.disabled is None


@dataclass(frozen=True, slots=True)
class MarkedFile:
    """What the text of a test file says.

    `path` is relative to the project's root, with slashes. `tests` are the tests that the text defines, in pytest's
    words ("test_a", "TestB::test_c"), each once; a class that only inherits its tests stands for them. `marks` holds a
    mark for each scope that states one; the file's own is "". `inheriting` are test classes with bases, which may hold
    more tests than the text shows.
    """

    path: str
    tests: tuple[str, ...]
    marks: Mapping[str, SuiteMark]
    inheriting: frozenset[str] = frozenset()

    def knows(self, test: str) -> bool:
        """True for a test that the text shows or that one of its classes may inherit."""
        while test:
            if test in self.tests or test in self.inheriting:
                return True
            test = test.rpartition("::")[0]
        return False

    def scope_of(self, test: str) -> str:
        """The scope whose mark counts for a test: the test itself, its class, or the file ("")."""
        scope = test
        while scope and scope not in self.marks:
            scope = scope.rpartition("::")[0]
        return scope

    def mark_of(self, test: str) -> SuiteMark | None:
        """The mark that counts for a test."""
        return self.marks.get(self.scope_of(test))

    def target_of(self, test: str) -> str:
        """What pytest is told to run the test with: the file, or what the file marks as exclusive by itself."""
        scope = self.scope_of(test)
        return f"{self.path}::{scope}" if scope and self.marks[scope].exclusive else self.path

    def marks_in_use(self) -> tuple[SuiteMark, ...]:
        """Each mark that is the nearest of at least one test, once, in the order of the file."""
        found = {mark.line: mark for mark in map(self.mark_of, self.tests) if mark is not None}
        return tuple(found[line] for line in sorted(found))


def read_marks(path: str, text: str, project: Project) -> MarkedFile:
    """Reads one test file. Raises MarkError naming file and line, also when the text is no Python."""
    try:
        tree = ast.parse(text, path)
    except SyntaxError as error:
        raise MarkError(f"{path}:{error.lineno}: not Python: {error.msg}") from error
    reader = _Reader(path, project)
    reader.read("", tree)
    reader.refuse_the_rest(tree)
    return MarkedFile(path, tuple(dict.fromkeys(reader.tests)), reader.marks, frozenset(reader.inheriting))


class _Reader:
    """Collects the tests and marks of one file."""

    def __init__(self, path: str, project: Project) -> None:
        self._path = path
        self._project = project
        self._placed: set[int] = set()
        self.tests: list[str] = []
        self.marks: dict[str, SuiteMark] = {}
        self.inheriting: set[str] = set()

    def read(self, scope: str, node: Scope) -> None:
        written = [call for call in _mark_expressions(node) if _is_mark(call.func)]
        self._placed.update(id(call.func) for call in written)
        if len(written) > 1:
            raise self._error(written[1], "a second suite mark for the same tests; keep one")
        if written:
            self.marks[scope] = self._mark(written[0])
        if isinstance(node, _FUNCTIONS):
            self.tests.append(scope)
            return
        num_before = len(self.tests)
        self._refuse_doubles(node)
        for member in _statements(node):
            below = f"{scope}::" if scope else ""
            self.tests += [below + name for name in _borrowed_tests(member)]
            if isinstance(member, (*_FUNCTIONS, ast.ClassDef)) and self._is_test(member):
                self.read(below + member.name, member)
        if isinstance(node, ast.ClassDef):
            self._look_at_class(scope, node, len(self.tests) - num_before)

    def _look_at_class(self, scope: str, node: ast.ClassDef, num_tests: int) -> None:
        if node.bases:
            self.inheriting.add(scope)
            if not num_tests:
                self.tests.append(scope)  # what it inherits
        constructors = [each for each in node.body if getattr(each, "name", None) in ("__init__", "__new__")]
        if constructors and num_tests and not _is_unittest(node):
            raise self._error(constructors[0], f"{node.name} has a constructor, so pytest would not collect it")

    def _refuse_doubles(self, node: Scope) -> None:
        """Of two tests of one name only the second runs; below `if` and `else` there may be one each."""
        lines: dict[str, int] = {}
        for member in node.body:
            names = _borrowed_tests(member)
            if isinstance(member, (*_FUNCTIONS, ast.ClassDef)) and self._is_test(member):
                names = [member.name]
            for name in names:
                if name in lines:
                    raise self._error(member, f"a second {name}: the first, in line {lines[name]}, never runs")
                lines[name] = member.lineno

    def _is_test(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
        if isinstance(node, _FUNCTIONS):
            return _fits(node.name, self._project.function_patterns)
        if _is_switched_off(node):
            return False
        return _is_unittest(node) or _fits(node.name, self._project.class_patterns)

    def refuse_the_rest(self, tree: ast.Module) -> None:
        """A mark that is stored, aliased, computed or set on one parameter would be seen by pytest and not here."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_mark(node) and id(node) not in self._placed:
                raise self._error(
                    node, "a suite mark belongs into `pytestmark` or directly above a test or a test class"
                )

    def _mark(self, call: ast.Call) -> SuiteMark:
        suites = tuple(self._literal(each) for each in call.args)
        if not suites or not all(isinstance(name, str) for name in suites):
            raise self._error(call, 'a suite mark names its suites first, as in suite("cpu")')
        for number, name in enumerate(suites):
            if name not in self._project.suites:
                raise self._error(call, f"unknown suite {name!r}{nearest(name, self._project.suites)}")
            if name in suites[:number]:
                raise self._error(call, f"suite {name!r} is named twice")
        given = {}
        for keyword in call.keywords:
            if keyword.arg not in KEYWORDS:
                name = keyword.arg or "**"
                raise self._error(call, f"a suite mark has no {name!r}{nearest(name, KEYWORDS)}")
            given[keyword.arg] = self._literal(keyword.value)
        return SuiteMark(suites, call.lineno, **self._checked(call, given))

    def _checked(self, call: ast.Call, given: dict[str, Any]) -> dict[str, Any]:
        seconds, stage = given.get("seconds", 1.0), given.get("stage", STAGES[0])
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 86_400:
            raise self._error(call, f"seconds must be a number above 0, not {seconds!r}")
        if stage not in STAGES:
            raise self._error(
                call, f"unknown stage {stage!r}{nearest(str(stage), STAGES)} (known: {', '.join(STAGES)})"
            )
        if not isinstance(given.get("exclusive", False), bool):
            raise self._error(call, f"exclusive must be True or False, not {given['exclusive']!r}")
        needs, known = given.get("needs", ()), self._project.settings.capabilities
        if not isinstance(needs, (tuple, list)) or not all(isinstance(need, str) for need in needs):
            raise self._error(call, f'needs must be a tuple of names, as in needs=("fp8",), not {needs!r}')
        for need in needs:
            if need not in known:
                raise self._error(call, f"unknown capability {need!r}{nearest(need, known)}")
        values = {name: value for name, value in given.items() if name not in _DISABLING}
        return {**values, "needs": tuple(needs), "disabled": self._disabled(call, given)}

    def _disabled(self, call: ast.Call, given: dict[str, Any]) -> Disabled | None:
        stated = [name for name in _DISABLING if name in given]
        if not stated:
            return None
        for name in _DISABLING:
            if not isinstance(given.get(name), str) or not given[name].strip():
                raise self._error(
                    call, f"a disabled test states disabled=, issue= and since=; {name} is missing"
                )
        if not given["issue"].startswith(("https://", "http://")):
            raise self._error(call, f"issue must be a link, not {given['issue']!r}")
        try:
            since = date.fromisoformat(given["since"])
        except ValueError:
            raise self._error(call, f"since must be a date like 2026-01-31, not {given['since']!r}") from None
        # Its author's day may have begun earlier than this machine's.
        if since > date.today() + timedelta(days=1):
            raise self._error(call, f"since must not lie in the future, as {since} does")
        return Disabled(given["disabled"], given["issue"], since)

    def _literal(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise self._error(node, f"a suite mark takes literals only, not `{ast.unparse(node)}`") from None

    def _error(self, node: ast.expr | ast.stmt, text: str) -> MarkError:
        return MarkError(f"{self._path}:{node.lineno}: {text}")


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when a module or class is made, those below `if`, `try` and `with` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
            if not isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                yield from _statements(child)
        elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
            yield from _statements(child)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    """pytest's rule for python_functions and python_classes: a beginning, or a pattern where it has wildcards."""
    return any(
        fnmatch(name, pattern) if set(pattern) & set("*?[") else name.startswith(pattern)
        for pattern in patterns
    )


def _is_unittest(node: ast.ClassDef) -> bool:
    """True for what pytest collects whatever it is called."""
    return any(
        ast.unparse(base).rpartition(".")[2] in ("TestCase", "IsolatedAsyncioTestCase") for base in node.bases
    )


def _is_switched_off(node: ast.ClassDef) -> bool:
    """True for a class that says `__test__ = False`."""
    return any(
        isinstance(each, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "__test__" for target in each.targets)
        and isinstance(each.value, ast.Constant)
        and each.value.value is False
        for each in node.body
    )


def _borrowed_tests(statement: ast.stmt) -> list[str]:
    """Tests that a statement takes from elsewhere: imported, or assigned."""
    if isinstance(statement, ast.ImportFrom):
        names = [alias.asname or alias.name for alias in statement.names]
    elif isinstance(statement, ast.Assign):
        names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    else:
        names = []
    return [name for name in names if name.startswith("test_")]


def _mark_expressions(node: Scope) -> Iterator[ast.Call]:
    """The calls that pytest takes for marks of this scope: decorators, and what `pytestmark` is set to."""
    found: list[ast.expr] = [] if isinstance(node, ast.Module) else list(node.decorator_list)
    if not isinstance(node, _FUNCTIONS):
        for statement in node.body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in targets):
                    value = statement.value
                    found += value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
    yield from (each for each in found if isinstance(each, ast.Call))


def _is_mark(node: ast.expr) -> bool:
    """True for `pytest.mark.suite` and `mark.suite`."""
    if not isinstance(node, ast.Attribute) or node.attr != "suite":
        return False
    return ast.unparse(node.value) in ("pytest.mark", "mark")
