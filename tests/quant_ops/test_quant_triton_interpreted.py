"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu")

OPS = ("per_token_quant_fp8", "per_token_group_quant_fp8", "per_token_group_quant_int8", "scaled_mm_fp8")


@pytest.mark.parametrize("op", OPS)
def test_triton_kernel_in_the_interpreter(op: str) -> None:
    script = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, str(script), op, "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_known_without_triton(op: str) -> None:
    """The files import, and say what the kernel needs, where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lockstep.ops.registry import kernels\n"
        f"found = [kernel.provider for kernel in kernels({op!r})]\n"
        "assert 'triton' in found, found\n"
        "assert not [name for name in sys.modules if name.startswith('triton.')]\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
