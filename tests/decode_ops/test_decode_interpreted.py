"""The Triton kernels of a decode step in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=20)

pytest.importorskip("triton")


OPERATORS = ("norm_rope_store", "linear", "add_norm_linear")
IN_BLOCKS = ("linear/1", "linear/4", "add_norm_linear/1", "add_norm_linear/gated")


def run(script: str, *given: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), *given]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


def test_kernels_meet_their_contracts() -> None:
    run("interpreted.py", "1", *OPERATORS, *IN_BLOCKS)


def test_gated_blocks_of_any_size_in_any_order() -> None:
    run("interpreted_gates.py", "1", "40")
