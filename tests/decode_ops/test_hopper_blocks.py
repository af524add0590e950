"""How products are shared out on Hopper, and the kernel in CUDA C++ through NVIDIA's compiler, which needs no GPU."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

import pytest
import torch
from hopper_card import hopper

from lockstep.core.errors import KernelError
from lockstep.ops.linear.hopper_blocks import (
    COPY_REGISTERS,
    MEASURED,
    MOST_ROWS,
    MOST_SHARED_BYTES,
    HopperBlock,
    Way,
    block_in,
    block_of,
    registers,
    result_rows,
    rows_at_once,
    shared_bytes,
)
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu", seconds=30)

SHAPES = [
    *((problem.outputs, problem.inputs, problem.gated) for problem in MEASURED),
    *((28672, 4096, True), (4096, 14336, False), (576, 1536, False), (96, 64, True), (40, 8, False)),
    *((19456, 2560, True), (2560, 9728, False), (152064, 3584, False)),
]


@pytest.mark.parametrize("outputs, inputs, gated", dict.fromkeys(SHAPES))
def test_every_block_fits_and_reaches_every_row(outputs: int, inputs: int, gated: bool) -> None:
    for rows in range(1, MOST_ROWS + 1):
        block = block_of(rows, outputs, inputs, gated=gated)
        if block is None:
            continue
        assert shared_bytes(block) <= MOST_SHARED_BYTES
        assert block.rows * 2 >= rows and block.rows <= 256 and block.rows % (8 * block.splits) == 0
        assert rows_at_once(block) % 8 == 0 and rows_at_once(block) <= 256
        assert (block.rows // block.splits) % result_rows(block) == 0
        assert 2 <= block.stages <= max(2, ceil(ceil(inputs / 64) / block.splits))
        if registers(block):
            # The multiprocessor's, in steps of eight: 128 of a thread at the start.
            after = 128 * (block.warpgroups * registers(block) + COPY_REGISTERS)
            assert after <= 65536 and registers(block) % 8 == 0 and block.warpgroups == 3


def test_what_was_measured_is_looked_up_by_the_fewest_rows_that_suffice() -> None:
    assert block_of(1, 1024, 3072, gated=False) is None
    assert block_of(2, 1024, 3072, gated=False) == block_in(2, 3072, Way(1, 4))
    assert block_of(192, 6144, 4096, gated=False) == block_in(192, 4096, Way(1, 1))
    assert block_of(193, 6144, 4096, gated=False) is None
    rows_of = defaultdict(list)
    for problem in MEASURED:
        rows_of[problem[1:]].append(problem.rows)
    for each in rows_of.values():
        assert each == sorted(set(each)) and each[-1] == MOST_ROWS


def test_rows_that_none_was_made_for_are_left_to_others() -> None:
    assert block_of(0, 4096, 4096, gated=False) is None
    assert block_of(MOST_ROWS + 1, 4096, 4096, gated=False) is None
    assert block_of(1, 4096, 5120, gated=False) is None, "one row, where nothing was timed"
    assert block_of(2, 4096, 5120, gated=False) is not None


def test_what_was_not_measured_fills_the_device_in_one_round() -> None:
    """Shapes of other models, by the rule: 100 thread blocks and more, and few that wait for a second round."""
    for outputs, inputs in ((4096, 14336), (5120, 5120), (8192, 8192), (2560, 9728)):
        for rows in (8, 64, 128):
            block = block_of(rows, outputs, inputs, gated=False)
            assert block is not None
            thread_blocks = ceil(outputs / (64 * block.warpgroups)) * block.splits
            assert 80 <= thread_blocks <= 132, (outputs, inputs, rows, block)


def test_parts_of_sums_that_do_not_fit_are_no_way() -> None:
    assert block_in(256, 4096, Way(3, 1)) is not None
    assert block_in(256, 4096, Way(4, 4)) is None
    assert block_in(256, 4096, Way(1, 3)) is None, "288 rows are too many for one instruction"


def test_a_hopper_without_the_bindings_gets_tritons_kernel() -> None:
    signature = {"dtype": torch.bfloat16, "inputs": 64, "outputs": 64, "bias": False}
    selector = KernelSelector(hopper("sm_90", "triton"), ("cuda", "triton", "torch"))
    binding = selector.bind("linear", "here", signature)
    assert binding.kernel.provider == "triton"
    assert "cuda_bindings" in dict(binding.refused)["cuda"]


bindings = pytest.importorskip("cuda.bindings.nvrtc", reason="NVIDIA's bindings are not here")


def test_a_hopper_with_the_bindings_gets_our_kernel_and_keeps_what_it_compiles(tmp_path: Path) -> None:
    signature = {"dtype": torch.bfloat16, "inputs": 64, "outputs": 64, "bias": False}
    capabilities = hopper("sm_90", "triton", "cuda_bindings")
    selector = KernelSelector(capabilities, ("cuda", "triton", "torch"), measured_in=tmp_path)
    function = selector.bind("linear", "here", signature).function
    assert function.keywords == {"cache_dir": tmp_path}
    assert selector.bind("linear", "elsewhere", signature).function is function, (
        "a compiler knows one by its name"
    )
    fused = signature | {"weight_dtype": torch.bfloat16, "gated": False, "adds": True}
    bound = selector.bind_fused("add_norm_linear", "there", fused)
    assert bound is not None and bound.kernel.provider == "cuda"
    assert bound.function.keywords == {"cache_dir": tmp_path}
    refused = selector.bind("linear", "elsewhere", signature | {"dtype": torch.float32}).refused
    assert dict(refused)["cuda"] == "multiplies bfloat16 and float16, not torch.float32"


BLOCKS = [
    *((block_of(rows, 24576, 4096, gated=True), True) for rows in (1, 24, 128, 200, 256)),
    *((block_of(rows, 1024, 2048, gated=False), False) for rows in (2, 64, 192, 256)),
    *((block_of(rows, 4096, 12288, gated=False), False) for rows in (16, 96, 256)),
    (block_in(256, 4096, Way(3, 4)), False),
    (block_in(256, 4096, Way(2, 1)), True),
]


@pytest.mark.parametrize("block, gated", BLOCKS, ids=str)
def test_compiles_without_spilling_or_serialising(block: HopperBlock, gated: bool, tmp_path: Path) -> None:
    """Sums that leave the registers make the product five times slower, and still right: nothing else would tell."""
    from lockstep.ops.linear.hopper import source

    assert_compiles_well(block, partial(source, block, gated=gated, has_bias=True), tmp_path)


@pytest.mark.parametrize("rows", [1, 24, 128, 160, 200, 256])
def test_the_best_of_each_row_stays_in_registers_too(rows: int, tmp_path: Path) -> None:
    from lockstep.ops.linear.hopper import finds_best, source

    block = block_of(rows, 151936, 1024, gated=False)
    assert block is not None and finds_best(block, rows)
    assert_compiles_well(block, partial(source, block, best=True), tmp_path)


def assert_compiles_well(block: HopperBlock, source: Callable[[torch.dtype], str], tmp_path: Path) -> None:
    from triton import knobs

    from lockstep.ops.cuda_program import machine_code

    for dtype in (torch.bfloat16, torch.float16):
        text = source(dtype)
        file = tmp_path / "kernel.cubin"
        file.write_bytes(machine_code(text, "sm_90a", None))
        listing = [knobs.nvidia.nvdisasm.path, "-c", file]
        assembly = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"\s(STL|LDL)\b", assembly), "registers are spilled"
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        start = int(re.findall(r"REG:(\d+)", usage)[0])
        assert start * 128 * (block.warpgroups + 1) <= 65536
        assert ("USETMAXREG" in assembly) == (registers(block) > 0)
        # With fewer at the start, threads that multiply would wait forever for theirs.
        assert not registers(block) or start == 128
        assert len(re.findall(r"WARPGROUP\.ARRIVE", assembly)) == 1, "products wait for each other"
        assert len(re.findall(r"\sHGMMA", assembly)) == 4 * block.rows // rows_at_once(block)
        assert "UTMALDG" in assembly and "ACQBULK" in assembly, "nothing is copied, or nothing is waited for"


def test_compiled_code_is_kept_and_what_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.ops import cuda_program

    made: list[bytes] = []

    def compiled(source: bytes, architecture: str) -> bytes:
        made.append(source)
        return b"code of " + source

    monkeypatch.setattr(cuda_program, "_compiled", compiled)
    for _ in range(2):
        assert cuda_program.machine_code("a", "sm_90a", tmp_path) == b"code of a"
    assert cuda_program.machine_code("a", "sm_100a", tmp_path) == b"code of a"
    assert len(made) == 2, "for another architecture it is another kernel"
    for file in (tmp_path / "compiled").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert cuda_program.machine_code("a", "sm_90a", tmp_path) == b"code of a"
    assert len(made) == 3
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert cuda_program.machine_code("b", "sm_90a", blocked) == b"code of b"


def test_a_mistake_is_told_in_the_compilers_words() -> None:
    from lockstep.ops.cuda_program import machine_code

    with pytest.raises(KernelError, match='expected a ";"'):
        machine_code("__global__ void kernel() { int a }", "sm_90a", None)
