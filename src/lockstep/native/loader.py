"""The extension module, or the reason why it is not there. Nothing is loaded before somebody asks."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

_MODULE = "lockstep.native._native"
_REASON_FILE = Path(__file__).with_name("not_built.txt")
"""Written by an installation that had to do without the extension."""


def extension() -> ModuleType | None:
    """The compiled module, the same one at every call; None where it cannot be had (see `why_not`)."""
    return _load()[0]


def why_not() -> str:
    """Why there is no extension, in one line, e.g. "not built: no C++ compiler"; empty when there is one."""
    return _load()[1]


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(_MODULE), ""
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None, f"not built: {_reason()}"
    except ImportError as error:
        # Loaders put the path before the fault; the fault is what a reader looks for.
        fault = str(error).removeprefix(f"{error.path}: ")
        return None, f"cannot be loaded: {fault}"


def _reason() -> str:
    try:
        return _REASON_FILE.read_text("utf-8").strip()
    except OSError:
        return "these sources were never installed with pip"
