"""The Triton kernels of a decode step in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=60)

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "op", ["norm_rope_store", "linear", "add_norm_linear", "linear/1", "linear/4", "add_norm_linear/1"]
)
def test_meets_its_contract(op: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), "1", op]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
