"""The Triton kernels that choose tokens in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=10)

pytest.importorskip("triton")


def test_meets_its_contract_and_draws_as_by_hand() -> None:
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
