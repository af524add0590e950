"""The Triton kernels of a decode step in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu", seconds=60)

pytest.importorskip("triton")


OPERATORS = ("norm_rope_store", "linear", "add_norm_linear")
IN_BLOCKS = ("linear/1", "linear/4", "add_norm_linear/1", "add_norm_linear/gated")


def run(script: str, *given: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), *given]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("op", OPERATORS + IN_BLOCKS)
def test_meets_its_contract(op: str) -> None:
    run("interpreted.py", "1", op)


@pytest.mark.parametrize("seed", [1, 2])
def test_gated_blocks_of_any_size_in_any_order(seed: int) -> None:
    run("interpreted_gates.py", str(seed), "20")
