"""The extension for tests that need it. A machine that cannot build it skips them and says why; with
LOCKSTEP_REQUIRE_NATIVE=1 its absence is a failure."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from lockstep.native import extension, why_not


@pytest.fixture(scope="session")
def native() -> ModuleType:
    module = extension()
    if module is None:
        if os.environ.get("LOCKSTEP_REQUIRE_NATIVE"):
            pytest.fail(f"no native kernels: {why_not()}")
        pytest.skip(f"no native kernels: {why_not()}")
    return module
