"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.suite("cpu")

OPS = (
    "rms_norm",
    "var_rms_norm",
    "add_rms_norm",
    "layer_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "rope",
    "kv_store",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_in_the_interpreter() -> None:
    script = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, str(script), "1", *OPS]
    found = subprocess.run(command, capture_output=True, text=True, timeout=250)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


def test_kernels_are_known_without_triton() -> None:
    """The files import, and say what the kernel needs, where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lockstep.ops.registry import kernels\n"
        f"for op in {OPS!r}:\n"
        "    triton = next(kernel for kernel in kernels(op) if kernel.provider == 'triton')\n"
        "    assert 'triton' in triton.features and 'cuda' in triton.platforms, op\n"
        "assert not [name for name in sys.modules if name.startswith('triton.')]\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
