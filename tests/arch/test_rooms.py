"""Rooms: who may import whom, and what each says of itself. The table is the one in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import pytest
from source_tree import PACKAGE, Module, modules, ranks, torch_free

pytestmark = pytest.mark.suite("cpu")

HEAVY = ("torch", "transformers", "safetensors.torch")


def misplaced_imports(found: Iterable[Module]) -> list[str]:
    """Imports of a room of the same or a higher rank.

    Those for type checkers count too: a name in a signature is knowledge of the other room.
    The package's own __init__ is no room: it is the face of all of them.
    """
    return [
        f"{module.where}:{line} {module.room} ({ranks()[module.room]}) imports {name}"
        for module in found
        if module.room
        for line, name in module.imports()
        for other in (name.split(".")[1] if name.startswith("lockstep.") else "",)
        if other in ranks() and other != module.room and ranks()[other] >= ranks()[module.room]
    ]


def test_rooms_import_only_rooms_of_lower_rank() -> None:
    assert misplaced_imports(modules()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import lockstep.server.app",
        "from lockstep.parallel.mesh import Mesh",
        "def f() -> None:\n    from lockstep.layers import norm",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lockstep.kv.pool.pool import KVPool",
    ],
)
def test_a_misplaced_import_is_found(text: str) -> None:
    assert len(misplaced_imports([Module("ops/wrong.py", text)])) == 1
    assert misplaced_imports([Module("cli/right.py", text)]) == []


def test_every_room_is_in_the_table_and_the_table_has_no_others() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ranks())
    assert {module.room for module in modules()} == {*folders, ""}


def test_imports_name_modules_that_exist() -> None:
    """A name that no room has would otherwise pass as no room at all."""
    known = {module.name for module in modules()}
    for module in modules():
        for line, name in module.imports():
            if name.startswith("lockstep.") and name != "lockstep.__version__":
                assert name in known or name.rpartition(".")[0] in known, f"{module.where}:{line} {name}"


def test_every_package_has_an_init_with_a_docstring() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    for module in modules():
        assert ast.get_docstring(module.tree), f"{module.where} has no docstring"


@pytest.mark.parametrize("room", sorted(ranks()))
def test_a_room_says_what_it_owns_and_what_to_read_first(room: str) -> None:
    text = next(module for module in modules() if module.where == f"{room}/__init__.py")
    words = " ".join((ast.get_docstring(text.tree) or "").split())
    assert re.search(r"\bOwns: \S", words) and re.search(r"\bMust not know: \S", words)
    first = re.search(r"Read first: (.*)", words)
    assert first, "does not say which file to read first"
    named = re.findall(r"`([\w/.]+)`", first[1])
    assert named, "names no file to read first"
    for name in named:
        assert (PACKAGE / room / name).exists(), f"{room}/{name} does not exist"


def test_torch_free_rooms_do_not_name_torch_at_their_top() -> None:
    """Imports inside a function or for type checkers do not run when the module is imported."""
    for module in modules():
        dotted = module.name.removeprefix("lockstep.")
        if any(dotted == name or dotted.startswith(f"{name}.") for name in torch_free()):
            for node in module.tree.body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] in HEAVY for name in names), f"{module.where}:{node.lineno}"


@pytest.mark.parametrize("room", ["core", "config", "formats", "tokenizer", "scheduler"])
def test_rooms_that_must_not_know_torch_never_name_it(room: str) -> None:
    """Not even late or for type checkers."""
    named = [
        f"{module.where}:{line}"
        for module in modules()
        if module.room == room or module.where.startswith("kv/index/")
        for line, name in module.imports()
        if name.split(".")[0] == "torch"
    ]
    assert named == []
