"""The second product of a mixture on Hopper: its blocks, who takes it, and the kernel through NVIDIA's compiler."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_card import hopper

from lockstep.ops.fused_moe.hopper_down_blocks import DownBlock, DownShape, block_of, shared_bytes
from lockstep.ops.grouped_gemm.tiles import Tile
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu", seconds=20)

QWEN = DownShape(8, 2048, 768)
SHAPES = [
    *(
        QWEN,
        QWEN._replace(inner=384),
        QWEN._replace(inner=192),
        DownShape(8, 4096, 1536),
        DownShape(6, 2048, 1408),
    ),
    *(DownShape(4, 2880, 2880), DownShape(8, 2048, 1024), DownShape(1, 5120, 8192), DownShape(2, 96, 64)),
    *(DownShape(32, 1024, 512), DownShape(3, 577, 8)),
]
MULTIPROCESSORS = 132
BYTES_OF_A_BLOCK = 227 * 1024


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_fits_and_few_tokens_take_one_round(shape: DownShape) -> None:
    for num_tokens in range(1, MULTIPROCESSORS + 1):
        block = block_of(num_tokens, shape)
        assert block is not None
        known = 16 * block.warps * shape.top_k + 8 * (block.warps * block.stages + 1)
        assert shared_bytes(block, shape) + known <= BYTES_OF_A_BLOCK
        assert block.rows % (block.warps * block.at_once) == 0
        if num_tokens <= 2:
            assert num_tokens * ceil(shape.width / block.rows) <= MULTIPROCESSORS, "a second round"
        assert block.rows - shape.width < block.warps * block.at_once, "a turn with nothing to do"
        assert block.stages >= 3


def test_what_was_measured_is_what_is_bound() -> None:
    assert {tokens: block_of(tokens, QWEN) for tokens in (1, 2, 3, 4, 8, 16)} == {
        1: DownBlock(16, 8, 2, 6),
        2: DownBlock(32, 8, 2, 6),
        **dict.fromkeys((3, 4, 8, 16), DownBlock(16, 8, 2, 3)),
    }


@pytest.mark.parametrize(
    "num_tokens, shape",
    [
        (0, QWEN),
        (1, QWEN._replace(inner=33)),
        (1, QWEN._replace(top_k=33)),
        (1, DownShape(2, 4096, 14336)),
        (1, DownShape(32, 4096, 4096)),
    ],
    ids=str,
)
def test_what_does_not_fit_is_left_to_others(num_tokens: int, shape: DownShape) -> None:
    assert block_of(num_tokens, shape) is None


SIGNATURE = {"dtype": torch.bfloat16, "experts": 128, "top_k": 8, "width": 2048, "inner": 768}


def test_a_hopper_without_the_bindings_gets_tritons_kernel() -> None:
    binding = KernelSelector(hopper("sm_90", "triton"), ("cuda", "triton")).bind("fused_moe", "here", SIGNATURE)
    assert binding.kernel.provider == "triton"
    assert "cuda_bindings" in dict(binding.refused)["cuda"]


bindings = pytest.importorskip("cuda.bindings.nvrtc", reason="NVIDIA's bindings are not here")


def test_a_hopper_gets_our_kernel_where_it_has_a_block(tmp_path: Path) -> None:
    capabilities = hopper("sm_90", "triton", "cuda_bindings")
    selector = KernelSelector(capabilities, ("cuda", "triton"), measured_in=tmp_path)
    function = selector.bind("fused_moe", "here", SIGNATURE).function
    assert isinstance(function, partial) and function.keywords == {"measured_in": tmp_path}
    assert selector.bind("fused_moe", "elsewhere", SIGNATURE).function is function
    for change, said in (
        ({"dtype": torch.float32}, "multiplies bfloat16 and float16, not torch.float32"),
        ({"inner": 14336}, "has no block for 8 experts of a token with inner size 14336"),
    ):
        binding = selector.bind("fused_moe", "there", SIGNATURE | change)
        assert binding.kernel.provider == "triton" and dict(binding.refused)["cuda"] == said


def test_experts_that_no_engine_copies_go_to_tritons_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lockstep.ops.fused_moe import hopper_down, programs
    from lockstep.ops.fused_moe.kernels import cuda

    taken: list[Any] = []
    monkeypatch.setattr(hopper_down, "weighted_down", lambda *given: taken.append(given[4:]))
    monkeypatch.setattr(programs, "down_of_pairs", lambda *given: taken.append(given[4:]))
    memory = torch.zeros(4 * 96 * 64 + 8, dtype=torch.bfloat16)
    whole, shifted = memory[:-8], memory[1:-7]
    rows, weights, ids = torch.zeros(6, 64), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    tile = Tile(1, 8, 64, 4, 1)
    for down in (whole.view(4, 96, 64), whole.view(4, 64, 96).transpose(1, 2), shifted.view(4, 96, 64)):
        cuda._down_of_pairs(rows, down, weights, ids, tile, cache_dir=tmp_path)
    assert taken == [(block_of(3, DownShape(2, 96, 64)), tmp_path), (tile,), (tile,)]


BLOCKS = [
    *((block_of(num_tokens, QWEN), QWEN) for num_tokens in (1, 8)),
    *((block_of(4, shape), shape) for shape in (SHAPES[1], SHAPES[4], SHAPES[5], SHAPES[8])),
    (DownBlock(64, 4, 8, 3), QWEN),
]


@pytest.mark.parametrize("block, shape", BLOCKS, ids=str)
def test_compiles_without_spilling_and_copies_before_it_waits(
    block: DownBlock, shape: DownShape, tmp_path: Path
) -> None:
    from triton import knobs

    from lockstep.ops.cuda_program import machine_code
    from lockstep.ops.fused_moe.hopper_down import source

    for dtype in (torch.bfloat16, torch.float16):
        file = tmp_path / "kernel.cubin"
        file.write_bytes(machine_code(source(block, shape, dtype), "sm_90a", None))
        listing = [knobs.nvidia.nvdisasm.path, "-c", file]
        assembly = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"\s(STL|LDL)\b", assembly), "registers are spilled"
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        (static,) = map(int, re.findall(r"SHARED:(\d+)", usage))
        # 1,024 of these are the system's, which each block has beside its own.
        assert static - 1024 + shared_bytes(block, shape) <= BYTES_OF_A_BLOCK
        before, waits, after = assembly.partition("ACQBULK")
        assert waits and before.count("UBLKCP") == block.stages, "the ring is filled first"
        assert after.count("UBLKCP") >= 2, "what the first product made, and the rest of the weights"
        assert "PREEXIT" in after, "the next kernel starts when this one has waited"
