"""Where things lie in a project: the package with its rooms, operators and models, the tests, the rest."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

PACKAGE, PACKAGE_FOLDER, TESTS = "lockstep", "src/lockstep", "tests"

COMPILED = frozenset({".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inc", ".cmake"})
"""Suffixes of sources that a compiler reads. No import says who uses what they become."""

EVERYTHING = (
    r"pyproject\.toml",
    r"(.*/)?CMakeLists\.txt",
    r"\.ci/(?!durations\.json).*",
    r"\.github/workflows/.*",
    r"scripts/ci/.*",
    r"src/lockstep/ci/[^/]+\.py",
)
"""Files that decide what is built, installed or run: after a change of one, every suite counts as touched."""


def decides_everything(path: str) -> bool:
    """True for a file that any test may depend on without naming it."""
    return is_compiled(path) or any(re.fullmatch(pattern, path) for pattern in EVERYTHING)


def is_package_code(path: str) -> bool:
    """True for a Python file of the package."""
    return path.startswith(f"{PACKAGE_FOLDER}/") and path.endswith(".py")


def is_test(path: str) -> bool:
    """True for a file that pytest collects."""
    name = PurePosixPath(path).name
    return is_tests_code(path) and (name.startswith("test_") or name.endswith("_test.py"))


def is_tests_code(path: str) -> bool:
    """True for a Python file among the tests, helpers included."""
    return path.startswith(f"{TESTS}/") and path.endswith(".py")


def is_compiled(path: str) -> bool:
    """True for a source that becomes part of a binary."""
    return PurePosixPath(path).suffix in COMPILED


def module(path: str) -> str | None:
    """The dotted name of a file of the package, None for any other file."""
    if not is_package_code(path):
        return None
    parts = path.removeprefix("src/").removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(name: str) -> str:
    """The file of a module that is no package."""
    return f"src/{name.replace('.', '/')}.py"


def room(path: str) -> str:
    """The package's room that a file lies in; elsewhere its top folder, or "project" for a file with none."""
    inside = path.removeprefix(f"{PACKAGE_FOLDER}/")
    if inside != path:
        return inside.partition("/")[0] if "/" in inside else PACKAGE
    return f"{path.partition('/')[0]}/" if "/" in path else "project"


def operator(path: str) -> str | None:
    """The operator whose folder a file lies in."""
    found = re.match(rf"{PACKAGE_FOLDER}/ops/(\w+)/", path)
    return found[1] if found else None


def is_kernel(path: str) -> bool:
    """True for a file that offers kernels of an operator."""
    return re.fullmatch(rf"{PACKAGE_FOLDER}/ops/\w+/kernels/(?!__init__)\w+\.py", path) is not None


def is_contract(path: str) -> bool:
    """True for a file that says what an operator means."""
    return re.fullmatch(rf"{PACKAGE_FOLDER}/ops/\w+/contract\.py", path) is not None


def model(path: str) -> str | None:
    """The name of the model file, for a file directly among the models."""
    found = re.fullmatch(rf"{PACKAGE_FOLDER}/models/\w+/(?!__init__)(\w+)\.py", path)
    return found[1] if found else None


def command(name: str) -> str:
    """The file of a command of the command line."""
    return f"{PACKAGE_FOLDER}/cli/{name}.py"


def is_gate(path: str) -> bool:
    """True for code that decides whether figures are good enough."""
    return path.startswith(f"{PACKAGE_FOLDER}/ci/gates/")


def is_baseline(path: str) -> bool:
    """True for committed figures that later ones are held against."""
    return path.endswith(".json") and "baseline" in path
