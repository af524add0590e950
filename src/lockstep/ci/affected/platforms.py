"""Which kernels a platform can bind, read from the text of the platforms: their ordered lists of providers."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable

from lockstep.ci.affected import layout
from lockstep.ci.affected.operators import kernels_in
from lockstep.ci.affected.symbols import parsed

_REFERENCE = "reference"
"""Stands at the end of every list."""


class Binding:
    """Platform to the providers that its lists name."""

    def __init__(self, paths: Iterable[str], text: Callable[[str], str]) -> None:
        """`text` gives the text of a file by its path, as it is now."""
        self._text = text
        self._providers: dict[str, set[str]] = {}
        for path in paths:
            if re.fullmatch(rf"{layout.PACKAGE_FOLDER}/platforms/.*\.py", path):
                self._read(text(path))

    def can_bind(self, platform: str, path: str) -> bool:
        """False for a file of kernels that are all of providers which the platform does not name.

        True for any other file, and for every file where the platform comes from another package.
        """
        if platform not in self._providers or not layout.is_kernel(path):
            return True
        return not self.offered_by(path).isdisjoint(self._providers[platform] | {_REFERENCE})

    def offered_by(self, path: str) -> set[str]:
        """Providers of the kernels in a file."""
        stem = path.rpartition("/")[2].removesuffix(".py")
        stated = kernels_in(self._text(path), layout.operator(path) or "", stem)
        return {kernel.provider for kernel in stated} or {stem}

    def _read(self, text: str) -> None:
        tree = parsed(text)
        for node in tree.body if tree is not None else ():
            if isinstance(node, ast.ClassDef):
                values = dict(_assigned(node))
                name = next((word for key, words in values.items() if key == "name" for word in words), None)
                if name is not None:
                    lists = (words for key, words in values.items() if key.endswith("_preference"))
                    self._providers[name] = {provider for words in lists for provider in words}


def _assigned(node: ast.ClassDef) -> Iterable[tuple[str, list[str]]]:
    """Attributes of a class, each with the texts in its value."""
    for statement in node.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name):
                texts = [each.value for each in ast.walk(statement.value) if isinstance(each, ast.Constant)]
                yield target.id, [text for text in texts if isinstance(text, str)]
