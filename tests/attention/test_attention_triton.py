"""The Triton programs in Triton's interpreter and through its compiler; the sizes they are launched with."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.attention.choice import OPERATORS
from lockstep.ops.attention_extend.tiles import (
    ENOUGH_PROGRAMS,
    MOST_SPLITS,
    decode_tile,
    extend_tile,
    least_turns,
    num_splits,
    power_of_two,
)

pytestmark = pytest.mark.suite("cpu")

HERE = Path(__file__).parent
IN_TRITON = (*OPERATORS, "attention_decode_shared")


@pytest.mark.parametrize("op", IN_TRITON)
def test_in_the_interpreter(op: str) -> None:
    """Which is chosen when Triton is imported: in a process of its own."""
    command = [sys.executable, str(HERE / "interpreted.py"), op, "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr


def test_parts_that_come_in_any_order() -> None:
    command = [sys.executable, str(HERE / "arrivals.py"), "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr


def test_through_the_compiler(tmp_path: Path) -> None:
    """Which needs no GPU, and refuses what the interpreter lets pass."""
    compile_for("sm_90", tmp_path)


@pytest.mark.suite("cpu", stage="nightly", seconds=40)
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_for_other_devices(target: str, tmp_path: Path) -> None:
    compile_for(target, tmp_path)


def compile_for(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "compiled.py"), target]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("op", IN_TRITON)
def test_kernels_are_known_without_triton(op: str) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lockstep.ops.registry import kernels\n"
        f"assert 'triton' in [kernel.provider for kernel in kernels({op!r})]\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_tiles_hold_a_token_and_fit_matrix_units() -> None:
    for group in range(1, 129):
        for head_dim in range(8, 257, 8):
            for itemsize in (2, 4):
                assert extend_tile(group, head_dim, itemsize).rows >= group
                for tile in (extend_tile(group, head_dim, itemsize), decode_tile(group, head_dim, itemsize)):
                    assert min(tile.rows, tile.keys) >= 16
                    assert tile.rows & (tile.rows - 1) == tile.keys & (tile.keys - 1) == 0


def test_powers_of_two() -> None:
    assert [power_of_two(size) for size in (1, 16, 17, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]


def test_splits_fill_the_device_and_forget_the_width_of_the_table() -> None:
    """A wider table only adds parts that no sequence uses: sizes of parts, and so the bits, stay the same."""
    assert num_splits(ENOUGH_PROGRAMS, 10**6, 64) == 1 and num_splits(1, 10**6, 64) == MOST_SPLITS

    def part_size(num_keys: int, parts: int, least: int) -> int:
        return max(least, math.ceil(math.ceil(num_keys / parts) / 64)) * 64

    for programs in (1, 7, 100, 600):
        for num_keys in (1, 64, 65, 1000, 8193):
            sizes = {
                part_size(num_keys, num_splits(programs, num_slots, 64), least_turns(programs))
                for num_slots in (num_keys, num_keys + 5, 2 * num_keys, 40_000)
            }
            assert len(sizes) == 1, (programs, num_keys)
