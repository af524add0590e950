"""What kernel and contract files state, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.ci.affected.symbols import parsed


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """A `Kernel(...)` as written. `verified_on` names devices; empty when it states none in literals."""

    op: str
    provider: str
    verified_on: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.op}.{self.provider}"


def kernels_in(text: str, op: str, provider: str) -> list[KernelFacts]:
    """The kernels that a file offers; `op` and `provider` serve where it computes them."""
    found = []
    for call in _calls(text, "Kernel"):
        stated = {keyword.arg: keyword.value for keyword in call.keywords}
        name, by = _text(stated.get("op")) or op, _text(stated.get("provider")) or provider
        found.append(KernelFacts(name, by, _texts(stated.get("verified_on"))))
    return found


def maker_of_kernels(text: str) -> str | None:
    """The module whose function makes a file's KERNELS, where the file only calls it, e.g. "lockstep.ops.native"."""
    tree = parsed(text)
    statements = tree.body if tree is not None else []
    made = [node for node in statements if _name(node) == "KERNELS"]
    used = {each.id for node in made for each in ast.walk(node) if isinstance(each, ast.Name)} - {"Kernel"}
    for node in statements:
        if isinstance(node, ast.ImportFrom) and used & {alias.name for alias in node.names}:
            return node.module
    return None


def tolerance_of(text: str) -> str:
    """A contract's tolerance as written, with what its own file defines of the names in it."""
    tree = parsed(text)
    if tree is None:
        return ""
    defined = {_name(node): node for node in tree.body}
    written = ""
    for call in _calls(text, "Contract"):
        for keyword in call.keywords:
            if keyword.arg == "tolerance":
                names = {node.id for node in ast.walk(keyword.value) if isinstance(node, ast.Name)}
                own = [ast.unparse(defined[name]) for name in sorted(names & defined.keys())]
                written += "\n".join([ast.unparse(keyword.value), *own])
    return written


def mutants_of(text: str) -> set[str]:
    """Names of the known-wrong versions that a contract lists in its own file, or a file of mutants in a dict."""
    tables = [
        keyword.value
        for call in _calls(text, "Contract")
        for keyword in call.keywords
        if keyword.arg == "mutants"
    ]
    tree = parsed(text)
    tables += [
        node.value
        for node in (tree.body if tree else [])
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _name(node) == "MUTANTS" and node.value is not None
    ]
    keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
    return {name for key in keys if (name := _text(key))}


def _calls(text: str, function: str) -> Iterator[ast.Call]:
    tree = parsed(text)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == function:
            yield node


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _texts(node: ast.expr | None) -> tuple[str, ...]:
    if not isinstance(node, (ast.Tuple, ast.List)):
        return ()
    return tuple(text for each in node.elts if (text := _text(each)) is not None)
