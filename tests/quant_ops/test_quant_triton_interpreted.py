"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu")

OPS = ("per_token_quant_fp8", "per_token_group_quant_fp8", "per_token_group_quant_int8", "scaled_mm_fp8")


def test_triton_kernels_in_the_interpreter() -> None:
    script = Path(__file__).with_name("interpreted.py")
    found = subprocess.run(
        [sys.executable, str(script), "1", *OPS], capture_output=True, text=True, timeout=250
    )
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


def test_kernels_are_known_without_triton() -> None:
    """The files import, and say what the kernel needs, where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lockstep.ops.registry import kernels\n"
        f"for op in {OPS!r}:\n"
        "    found = [kernel.provider for kernel in kernels(op)]\n"
        "    assert 'triton' in found, (op, found)\n"
        "assert not [name for name in sys.modules if name.startswith('triton.')]\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
