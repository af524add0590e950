"""The package as text: its modules, what they import, and the rooms that docs/architecture.md promises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "src" / "lockstep"
PAGE = PROJECT / "docs" / "architecture.md"


@dataclass(frozen=True)
class Module:
    """One file of the package, or a text that stands in for one."""

    where: str
    text: str

    @property
    def name(self) -> str:
        """The dotted name, e.g. "lockstep.ops.rope.contract" for "ops/rope/contract.py"."""
        parts = ("lockstep", *self.where.removesuffix(".py").split("/"))
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The folder directly below the package; empty for the package's own __init__."""
        return self.where.partition("/")[0] if "/" in self.where else ""

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.where)

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything imported: at the top, in functions and for type checkers alike."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.where}:{node.lineno} imports relatively"
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"

    def strings(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every string that is not a docstring, pieces of f-strings included."""
        prose = {
            id(node.value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield node.lineno, node.value

    def attributes(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every dotted access, the longest form of each, e.g. "torch.cuda.is_available"."""
        inner = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                yield node.lineno, ast.unparse(node)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node


@cache
def modules() -> tuple[Module, ...]:
    """Every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 100, "the package was not found"
    return tuple(Module(path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")) for path in paths)


@cache
def ranks() -> dict[str, int]:
    """Room to rank, from the table of docs/architecture.md."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 10, "the table of rooms was not found"
    return {room: int(rank) for room, rank in rows}


@cache
def torch_free() -> tuple[str, ...]:
    """Rooms and modules, without the package's name, that docs/architecture.md promises to work without torch."""
    _, found, rest = PAGE.read_text("utf-8").partition("Torch-free (tested with torch blocked):")
    assert found, "the torch-free rooms were not found"
    return tuple(re.findall(r"`([\w.]+)`", rest.partition("\n\n")[0]))
