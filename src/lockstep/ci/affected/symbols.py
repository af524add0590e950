"""Public names of a file and their signatures, before and after a change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class SymbolChange:
    """A public name that came, went or got another signature: `before` is None when it is new, `after` when it is
    gone. `name` is dotted within its module, e.g. "Kernel.refuses"."""

    path: str
    name: str
    before: str | None
    after: str | None

    @property
    def is_new_definition(self) -> bool:
        """True for a function or class of a module that was not there before."""
        is_defined = self.after is not None and self.after.startswith(("(", "async (", "class"))
        return self.before is None and is_defined and "." not in self.name


def changed_symbols(path: str, before: str, after: str) -> list[SymbolChange]:
    """The differences between two texts of one file, in the order of the text."""
    old, new = public_symbols(before), public_symbols(after)
    return [
        SymbolChange(path, name, old.get(name), new.get(name))
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]


def public_symbols(text: str) -> dict[str, str]:
    """Name to signature of the functions, classes, methods, attributes and constants that others may use.

    Names that start with an underscore are not public, nor is anything in them. A class's signature is its bases; its
    `__init__` counts as one of its methods. Of a constant only the annotation is a signature. Empty when the text
    does not parse.
    """
    tree = parsed(text)
    return {} if tree is None else dict(_symbols(tree.body, ""))


def same_code(before: str, after: str) -> bool:
    """True when two texts differ at most in comments, docstrings and layout."""
    trees = parsed(before), parsed(after)
    if None in trees:
        return before == after
    return _without_prose(trees[0]) == _without_prose(trees[1])


def parsed(text: str) -> ast.Module | None:
    """The syntax tree; None when the text is no Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _symbols(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, Function) and _is_public(node.name):
            yield prefix + node.name, _function(node)
        elif isinstance(node, ast.ClassDef) and _is_public(node.name):
            inherited = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
            yield prefix + node.name, f"class({inherited})" if inherited else "class"
            yield from _symbols(node.body, f"{prefix}{node.name}.")
        elif (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_public(node.target.id)
        ):
            # In a class a default decides whether callers must pass the field.
            default = f" = {ast.unparse(node.value)}" if prefix and node.value is not None else ""
            yield prefix + node.target.id, ast.unparse(node.annotation) + default
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and _is_public(target.id):
                    yield prefix + target.id, "constant"


def _function(node: Function) -> str:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    kind = "property " if marks & {"property", "cached_property"} else ""
    return (
        f"{kind}{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}({ast.unparse(node.args)}){returns}"
    )


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def _without_prose(tree: ast.Module | None) -> str:
    assert tree is not None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [each for each in node.body if not _is_text(each)]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
