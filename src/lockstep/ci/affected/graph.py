"""Which files a file needs, so that a change can be followed to the tests that would notice it.

A file needs what it imports (at its top or later), the modules and files that its texts name, what it finds by listing
a package, and, for a test, the conftest.py files above it. This errs on the side of too many: a test too much costs
minutes, a test too few hides a fault.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Literal

from lockstep.ci.affected import layout
from lockstep.ci.affected.mentions import Mentions, mentions

Kind = Literal["named", "bound", "loaded", "read"]
EVERY_KIND: tuple[Kind, ...] = ("named", "bound", "loaded", "read")
BY_NAME: tuple[Kind, ...] = ("named", "bound")

_FILE_NAME = re.compile(r"[\w./-]*\w\.\w+")
_GLOB = re.compile(r"[\w./*?-]*[*?][\w./*?-]*\.\w+")
_DOTTED = re.compile(rf"\b{layout.PACKAGE}(?:\.\w+)+")


class SourceGraph:
    """The needs of every file of a project.

    Four kinds of need are kept apart. Most are *named*: by an import, a file name, an operator's name. Who names an
    operator *binds* one of its kernels, those that the platform can use. Others are *loaded*: a registry lists a folder
    and loads whatever is there. And a check of habits *reads* every text of a kind.

    Importing `a.b.c` also runs the top of `a/__init__.py` and `a/b/__init__.py`, but not what those import late,
    inside functions. So each package has a second node, its top.
    """

    def __init__(self, sources: Mapping[str, str], files: Iterable[str]) -> None:
        """`sources`: text of every Python file by path. `files`: the paths of all files, Python or not."""
        self._files = frozenset(files) | frozenset(sources)
        self._modules = {name: path for path in sources if (name := layout.module(path))}
        self.operators = {
            name for path in sources if layout.is_contract(path) and (name := layout.operator(path))
        }
        self._mentions = {path: mentions(text, _package_of(path)) for path, text in sources.items()}
        self._by_name = _grouped_by_name(self._files)
        self._data_folders = self._find_data_folders()
        self._needing: dict[Kind, dict[str, set[str]]] = {kind: defaultdict(set) for kind in EVERY_KIND}
        for path in sources:
            self._link(path)
        self._link_unread_data()

    def dependents(self, changed: Iterable[str], kinds: Iterable[Kind] = EVERY_KIND) -> dict[str, int]:
        """Every file that needs one of `changed`, with the fewest steps between them; the changed files are at 0."""
        followed = [self._needing[kind] for kind in kinds]
        starts = [node for path in changed for node in (path, _top(path))]
        steps = dict.fromkeys(starts, 0)
        queue = deque(starts)
        while queue:
            node = queue.popleft()
            for needing in followed:
                for other in needing.get(node, set()) - steps.keys():
                    steps[other] = steps[node] + 1
                    queue.append(other)
        return {node: count for node, count in steps.items() if node in self._files}

    @property
    def sources(self) -> list[str]:
        """Every Python file."""
        return sorted(self._mentions)

    @property
    def tests_code(self) -> list[str]:
        """Every Python file among the tests."""
        return [path for path in self.sources if layout.is_tests_code(path)]

    def names_in(self, path: str) -> set[str]:
        """Every plain name that a Python file uses or imports."""
        found = self._mentions[path]
        return found.names | {dotted.rpartition(".")[2] for dotted in found.imports}

    def texts_in(self, path: str) -> set[str]:
        """Every text that a Python file states, docstrings aside."""
        return self._mentions[path].strings

    def _link(self, path: str) -> None:
        found = self._mentions[path]
        for dotted in found.imports:
            self._need(path, self._imported(path, dotted))
        if path.endswith("/__init__.py"):
            for dotted in found.at_import:
                self._need(_top(path), self._imported(path, dotted))
        for text in found.strings:
            self._need(path, self._modules_in(text))
            self._need(path, self._files_in(path, text), "read" if _GLOB.fullmatch(text) else "named")
            if text in self.operators and layout.operator(path) != text:
                for file in self._operator_files(text):
                    self._need(path, [file], "bound" if layout.is_kernel(file) else "named")
        self._need(path, self._listed(found), "loaded")
        if layout.is_tests_code(path):
            folders = PurePosixPath(path).parents
            self._need(path, (f"{folder}/conftest.py" for folder in folders if f"{folder}/conftest.py" != path))

    def _need(self, path: str, needed: Iterable[str], kind: Kind = "named") -> None:
        for node in needed:
            self._needing[kind][node].add(path)

    def _imported(self, path: str, dotted: str) -> Iterator[str]:
        if dotted.partition(".")[0] != layout.PACKAGE:
            yield from self._helper(path, dotted)
            return
        name = self._longest_module(dotted)
        if name is not None:
            yield from self._loaded(name)

    def _loaded(self, name: str) -> Iterator[str]:
        """What runs when the module is used: all of it, and the tops of the packages above it."""
        yield self._modules[name]
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self._modules:
                yield _top(self._modules[name])

    def _longest_module(self, dotted: str) -> str | None:
        while dotted and dotted not in self._modules:
            dotted = dotted.rpartition(".")[0]
        return dotted or None

    def _helper(self, path: str, dotted: str) -> Iterable[str]:
        """Files outside the package that an import may mean: beside the importer, else of that name anywhere."""
        name = dotted.partition(".")[0] + ".py"
        beside = str(PurePosixPath(path).with_name(name))
        if beside in self._mentions:
            return (beside,)
        return (other for other in self._by_name.get(name, ()) if layout.is_tests_code(other))

    def _modules_in(self, text: str) -> Iterator[str]:
        """Modules that a text names, as `python -m`, `package.module:Class` and code for a child process do."""
        for dotted in _DOTTED.findall(text):
            name = self._longest_module(dotted)
            if name is not None and name != layout.PACKAGE and dotted.count(".") - name.count(".") <= 1:
                yield from self._loaded(name)

    def _files_in(self, path: str, text: str) -> Iterator[str]:
        """Files that a text names, alone, as the end of a path, by a pattern or by their folder."""
        if _FILE_NAME.fullmatch(text):
            named = self._by_name.get(PurePosixPath(text).name, ())
            found = {other for other in named if f"/{other}".endswith(f"/{text.lstrip('./')}")}
        elif _GLOB.fullmatch(text):
            last = PurePosixPath(text).name
            found = {other for other in self._files if fnmatch(PurePosixPath(other).name, last)}
        else:
            found = set(self._data_folders.get(text.strip("/"), ()))
        yield from (other for other in found - {path} if _may_read(path, other))

    def _operator_files(self, name: str) -> Iterator[str]:
        folder = f"{layout.PACKAGE_FOLDER}/ops/{name}/"
        return (path for path in self._mentions if path.startswith(folder))

    def _listed(self, found: Mentions) -> set[str]:
        """Modules that a file loads without naming them: by an f-string, or by listing a package."""
        patterns = [re.compile(pattern) for pattern in found.patterns if pattern.startswith(layout.PACKAGE)]
        names = {name for name in self._modules for pattern in patterns if pattern.fullmatch(name)}
        if found.lists_packages:
            listed = names | found.imports
            names |= {name for name in self._modules if name.rpartition(".")[0] in listed}
        return {node for name in names for node in self._loaded(name)}

    def _link_unread_data(self) -> None:
        """A file that no text names belongs to the code beside it, or in the nearest folder above that has any."""
        for path in self._files - self._mentions.keys():
            is_read = any(needing.get(path) for needing in self._needing.values())
            if is_read or not path.startswith((f"{layout.PACKAGE_FOLDER}/", f"{layout.TESTS}/")):
                continue
            for folder in PurePosixPath(path).parents:
                beside = [other for other in self._mentions if PurePosixPath(other).parent == folder]
                if beside:
                    self._needing["read"][path].update(beside)
                    break

    def _find_data_folders(self) -> dict[str, set[str]]:
        """Folder name to the files below it, for folders that hold no Python."""
        code = {folder for path in self._mentions for folder in PurePosixPath(path).parents}
        below: dict[str, set[str]] = defaultdict(set)
        for path in self._files:
            for folder in PurePosixPath(path).parents:
                if folder not in code:
                    below[folder.name].add(path)
        return below


def _may_read(reader: str, path: str) -> bool:
    """The package reads files of its own; those it names elsewhere are its users'. Tests read what they like."""
    own = f"{PurePosixPath(reader).parent}/"
    return not layout.is_package_code(reader) or (path.startswith(own) and not path.endswith(".py"))


def _package_of(path: str) -> str:
    name = layout.module(path) or ""
    return name if path.endswith("/__init__.py") else name.rpartition(".")[0]


def _top(path: str) -> str:
    return f"top of {path}"


def _grouped_by_name(paths: Iterable[str]) -> dict[str, set[str]]:
    grouped: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        grouped[PurePosixPath(path).name].add(path)
    return grouped
