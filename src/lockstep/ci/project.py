"""What a project says about its suites: the table `[tool.lockstep.testing]` of its pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from lockstep.core.errors import ConfigError, nearest
from lockstep.platforms.registry import platform_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Stage = Literal["per-commit", "nightly"]
STAGES: tuple[Stage, ...] = ("per-commit", "nightly")
EVERY_STAGE = "all"
STAGE_CHOICES = (*STAGES, EVERY_STAGE)

_Table = TypeVar("_Table")
_PYTEST_OPTIONS = {
    "test_folders": "testpaths",
    "file_patterns": "python_files",
    "function_patterns": "python_functions",
    "class_patterns": "python_classes",
}
_FILES_OVER_PYPROJECT = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini")
"""Where one of them exists, pytest does not look into pyproject.toml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A kind of machine and what is tested on it. `platform` is a name that `lockstep.platforms` knows."""

    name: str
    platform: str
    devices: int = 1
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`[tool.lockstep.testing]`, without the suites.

    `capabilities` names what a mark's `needs` may ask of a device, each with its meaning. `loading` names packages
    that load models: memory that runs out inside them is the machine's failure. `durations` is the file of measured
    seconds, relative to the project's root.
    """

    seconds_per_test: float = 300.0
    loading: tuple[str, ...] = ()
    durations: str = ".ci/durations.json"
    capabilities: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Project:
    """A project with suites. `test_folders` and the patterns are pytest's `testpaths`, `python_files`,
    `python_functions` and `python_classes`."""

    root: Path
    suites: Mapping[str, Suite]
    settings: Settings
    test_folders: tuple[str, ...] = ("tests",)
    file_patterns: tuple[str, ...] = ("test_*.py", "*_test.py")
    function_patterns: tuple[str, ...] = ("test",)
    class_patterns: tuple[str, ...] = ("Test",)

    def suite(self, name: str) -> Suite:
        """The suite of that name. Raises ConfigError naming the nearest one."""
        if name not in self.suites:
            raise ConfigError(
                f"unknown suite {name!r}{nearest(name, self.suites)} (known: {', '.join(self.suites)})"
            )
        return self.suites[name]

    @property
    def durations_path(self) -> Path:
        """The file of measured seconds."""
        return self.root / self.settings.durations


def find_project(start: Path) -> Project | None:
    """The project whose pyproject.toml, in `start` or the nearest folder above that has one, states suites.

    Returns None when it states none. Raises ConfigError when the table is wrong.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            tools = _read(path).get("tool", {})
            stated = tools.get("lockstep", {}).get("testing")
            return None if stated is None else _project(folder, stated, tools.get("pytest", {}))
    return None


def open_project(start: Path) -> Project:
    """Like `find_project`; raises ConfigError where there is none."""
    project = find_project(start)
    if project is None:
        raise ConfigError(f"no pyproject.toml with [tool.lockstep.testing] in {start.resolve()} or above")
    return project


def _project(root: Path, stated: dict[str, Any], pytest_tables: dict[str, Any]) -> Project:
    where = f"{root / 'pyproject.toml'}: [tool.lockstep.testing"
    tables = {**stated}
    suites = {
        name: _filled(Suite, {"name": name, **table}, f"{where}.suites.{name}]")
        for name, table in tables.pop("suites", {}).items()
    }
    if not suites:
        raise ConfigError(f"{where}] states no suites; add a table [tool.lockstep.testing.suites.NAME]")
    for suite in suites.values():
        _check(suite, f"{where}.suites.{suite.name}]")
    settings = _filled(Settings, tables, f"{where}]")
    if settings.seconds_per_test <= 0:
        raise ConfigError(f"{where}]: seconds_per_test must be above 0, not {settings.seconds_per_test}")
    for name in _FILES_OVER_PYPROJECT:
        if (root / name).is_file():
            raise ConfigError(f"{root / name} hides pytest's options in pyproject.toml; move its own there")
    ini = pytest_tables.get("ini_options", pytest_tables)
    found = {name: _words(ini.get(option)) for name, option in _PYTEST_OPTIONS.items()}
    return Project(root, suites, settings, **{name: words for name, words in found.items() if words})


def _check(suite: Suite, where: str) -> None:
    if suite.devices < 1:
        raise ConfigError(f"{where}: devices must be at least 1, not {suite.devices}")
    known = platform_names()
    if suite.platform not in known:
        raise ConfigError(
            f"{where}: unknown platform {suite.platform!r}{nearest(suite.platform, known)} "
            f"(known here: {', '.join(known)})"
        )


def _filled(kind: type[_Table], values: dict[str, Any], where: str) -> _Table:
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no key {name!r}{nearest(name, known)}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _words(value: Any) -> tuple[str, ...]:
    """An option that pytest takes as a list or as words in one string."""
    return tuple(value.split() if isinstance(value, str) else value or ())
