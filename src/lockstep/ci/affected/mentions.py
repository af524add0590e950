"""What the text of one Python file names: modules, files, and patterns of modules that it looks for when it runs."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

_LISTERS = {"iter_modules", "walk_packages"}


@dataclass(slots=True)
class Mentions:
    """Names found in one file.

    `at_import` are dotted names imported at the top, so by everyone who imports the file; `late` those imported
    inside functions. Imports for type checkers alone are in neither: they never run. `strings` are all texts but
    docstrings. `patterns` are f-strings as regular expressions. `lists_packages`: it asks for the modules of a
    package and so finds what it does not name.
    `names` are all plain names and attributes.
    """

    at_import: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    lists_packages: bool = False

    @property
    def imports(self) -> set[str]:
        return self.at_import | self.late


def mentions(text: str, package: str = "") -> Mentions:
    """What a Python file names; nothing when it does not parse. `package` is the one that relative imports start in."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return Mentions()
    reader = _Reader(package)
    reader.visit(tree)
    return reader.found


class _Reader(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.found = Mentions()
        self._package = package.split(".") if package else []
        self._depth = 0

    def visit_Import(self, node: ast.Import) -> None:
        self._imported().update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        outer = self._package[: len(self._package) - node.level + 1] if node.level else []
        origin = ".".join([*outer, *([node.module] if node.module else [])])
        self._imported().update(f"{origin}.{alias.name}" for alias in node.names)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Expr(self, node: ast.Expr) -> None:
        if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.strings.add(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pieces = [
            re.escape(piece.value)
            if isinstance(piece, ast.Constant) and isinstance(piece.value, str)
            else r"\w+"
            for piece in node.values
        ]
        self.found.patterns.add("".join(pieces))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.found.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found.names.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.found.lists_packages |= ast.unparse(node.func).rpartition(".")[2] in _LISTERS
        self.generic_visit(node)

    def _imported(self) -> set[str]:
        return self.found.late if self._depth else self.found.at_import
