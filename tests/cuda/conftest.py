"""The GPU, and the checks that can also be run by hand: `gpu_check.py` of two neighbouring folders."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]


def _checks_of(folder: str) -> ModuleType:
    sys.path.append(str(TESTS / folder))
    spec = importlib.util.spec_from_file_location(f"gpu_check_{folder}", TESTS / folder / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def attention_checks() -> ModuleType:
    return _checks_of("attention")


@pytest.fixture(scope="session")
def quantiser_checks() -> ModuleType:
    return _checks_of("quant_ops")


@pytest.fixture
def seed() -> int:
    """A fresh one, printed."""
    found = secrets.randbelow(2**31)
    print(f"seed {found}")
    return found
