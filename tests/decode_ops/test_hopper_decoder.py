"""A whole decoder's new tokens in CUDA C++ for Hopper: how it is shared out, and that it compiles; no GPU needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.ops.decoder_decode.hopper_shape import (
    ROW_COUNTS,
    DecoderShape,
    grid_of,
    most_rows,
    rows_served,
    why_not,
)
from lockstep.ops.decoder_decode.kernels.cuda import KERNELS

pytestmark = pytest.mark.suite("cpu", seconds=12)

QWEN_0_6B = DecoderShape(1024, 3072, 8, 2, 128, 28, 16, True, False)
SHAPES = {
    "0.6B": QWEN_0_6B,
    "1.7B": DecoderShape(2048, 6144, 8, 2, 128, 28, 16, True, False),
    "4B": DecoderShape(2560, 9728, 8, 4, 128, 36, 16, True, False),
    "8B": DecoderShape(4096, 12288, 8, 4, 128, 36, 16, True, False),
    "Llama 1B": DecoderShape(2048, 8192, 8, 4, 64, 16, 16, False, False),
    "Qwen 2": DecoderShape(1024, 4864, 2, 8, 64, 24, 64, False, True),
    "tiny": DecoderShape(256, 256, 1, 2, 128, 2, 16, True, True),
}
SIGNATURE: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "pool_dtype": torch.bfloat16,
    "hidden_size": 1024,
    "inner_size": 3072,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "page_size": 16,
    "blocks": 28,
    "activation": "silu",
    "plain": True,
    "head_norms": True,
    "qkv_bias": False,
    "num_ranks": 1,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
def test_each_thread_block_has_a_share_of_every_product(name: str, multiprocessors: int) -> None:
    """Or words would be written again before all have read them: see hopper.cu."""
    shape = SHAPES[name]
    assert why_not(shape) is None
    for rows in ROW_COUNTS:
        grid = grid_of(shape, rows, multiprocessors)
        if grid is None:
            assert rows > 1
            continue
        assert grid.rows == rows and grid.blocks <= multiprocessors
        assert all(width // 8 >= grid.blocks for width in (shape.hidden, shape.inner, shape.qkv))
        assert rows * shape.kv_heads * grid.splits <= grid.blocks
        assert shape.group * shape.head_dim // 2 % grid.splits == 0 and 32 % grid.splits == 0
        assert grid.stages >= 6 and grid.shared_bytes <= 225 * 1024
    assert grid_of(shape, ROW_COUNTS[-1] + 1, multiprocessors) is None


def test_rows_between_counts_take_the_next_kernel() -> None:
    grids = [grid_of(QWEN_0_6B, rows, 132) for rows in range(1, 9)]
    assert [grid.rows for grid in grids if grid is not None] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_only_rows_that_find_room_are_served() -> None:
    """On a part of a card, or beside a wide feed-forward, fewer than are best computed so."""
    assert [rows_served(QWEN_0_6B, count) for count in (132, 114, 26)] == [4, 4, 2]
    wide = QWEN_0_6B._replace(inner=20480)
    assert grid_of(wide, 4, 132) is None and rows_served(wide, 132) == 2
    assert rows_served(QWEN_0_6B._replace(hidden=4096), 132) == 0


def test_steps_that_are_bound_have_a_kernel() -> None:
    for shape in SHAPES.values():
        for rows in range(1, most_rows(shape.hidden) + 1):
            assert grid_of(shape, rows, 132) is not None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_ranks": 2}, "one rank"),
        ({"dtype": torch.float16}, "bfloat16"),
        ({"pool_dtype": torch.float32}, "bfloat16"),
        ({"plain": False}, "plain weights"),
        ({"activation": "gelu"}, "Llama's"),
        ({"hidden_size": 576}, "hidden size of 576"),
        ({"inner_size": 1000}, "inner size of 1000"),
        ({"heads": 144}, "not 18 of 128"),
        ({"head_dim": 96}, "heads of 64 or 128"),
        ({"page_size": 1}, "pages of 1"),
        ({"hidden_size": 65536}, "no room"),
        ({"hidden_size": 4096, "inner_size": 12288}, "known to be faster"),
    ],
)
def test_refuses_what_it_cannot_serve(changed: dict[str, Any], told: str) -> None:
    (kernel,) = KERNELS
    assert kernel.refuses(SIGNATURE) is None
    reason = kernel.refuses({**SIGNATURE, **changed})
    assert reason is not None and told in reason


@pytest.mark.parametrize(
    ("name", "counts"), [("0.6B", ROW_COUNTS), ("8B", (1,)), ("Llama 1B", (2,)), ("tiny", (4,))]
)
def test_compiles(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    from triton import knobs

    from lockstep.ops.cuda_program import machine_code
    from lockstep.ops.decoder_decode.hopper import source

    shape, file = SHAPES[name], tmp_path / "kernel.cubin"
    for rows in counts:
        grid = grid_of(shape, rows, 132)
        assert grid is not None
        file.write_bytes(machine_code(source(shape, grid), "sm_90a", None))
        assembly = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file], capture_output=True, text=True, check=True
        ).stdout
        assert "UBLKCP" in assembly and "UTMALDG" in assembly
        if rows <= 4 and shape.hidden <= 1024:
            assert len(re.findall(r"\s(STL|LDL)\b", assembly)) < 64, "much leaves the registers"
