"""The extension, or one line that says why it is not there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from lockstep import native
from lockstep.cli.main import main
from lockstep.native import loader

pytestmark = pytest.mark.suite("cpu", seconds=3)

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was loaded is kept for the life of a process: these tests look at processes where it went wrong."""
    loader._load.cache_clear()
    yield
    loader._load.cache_clear()


def importing(monkeypatch: Patch, error: ImportError) -> None:
    def fail(name: str) -> NoReturn:
        assert name == "lockstep.native._native"
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


@pytest.fixture
def reason_file(monkeypatch: Patch, tmp_path: Path) -> Path:
    """Where an installation without the extension would have written; there is no extension."""
    monkeypatch.setattr(loader, "_MODULE", "lockstep.native._absent")
    monkeypatch.setattr(loader, "_REASON_FILE", tmp_path / "not_built.txt")
    return tmp_path / "not_built.txt"


def test_either_the_extension_or_a_reason() -> None:
    module, reason = native.extension(), native.why_not()
    assert isinstance(module, ModuleType) != bool(reason)
    assert "\n" not in reason
    assert native.extension() is module


def test_the_reason_is_what_the_installation_wrote(reason_file: Path) -> None:
    reason_file.write_text("no C++ compiler\n")
    assert native.extension() is None
    assert native.why_not() == "not built: no C++ compiler"
    assert native.features() == frozenset() and native.usable_instruction_sets() == ()
    assert native.summary() == "no native kernels (not built: no C++ compiler)"


def test_sources_that_were_never_installed(reason_file: Path) -> None:
    assert not reason_file.exists()
    assert native.why_not() == "not built: these sources were never installed with pip"


def test_an_extension_that_does_not_load(monkeypatch: Patch) -> None:
    path = "/somewhere/_native.so"
    importing(monkeypatch, ImportError(f"{path}: undefined symbol: twice", path=path))
    assert native.extension() is None
    assert native.why_not() == "cannot be loaded: undefined symbol: twice"


def test_a_fault_inside_the_extension_is_not_hidden(monkeypatch: Patch) -> None:
    importing(monkeypatch, ModuleNotFoundError("No module named 'other'", name="other"))
    with pytest.raises(ModuleNotFoundError, match="other"):
        native.extension()


def test_ops_list_says_so(reason_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason_file.write_text("no Python headers\n")
    assert main(["ops", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no native kernels (not built: no Python headers)"
