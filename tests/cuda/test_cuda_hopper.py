"""Products by the kernel in CUDA C++, on NVIDIA's Hopper: every way to share them out, any size, early launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_chain import Chain, assert_waits, bound, drawn
from torch.nn.functional import silu

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "sm_90", "cuda_bindings"), seconds=40)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding to bfloat16, and what cancels."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2**-7, atol=2**-8)


def ways() -> list[Any]:
    from lockstep.ops.linear.hopper_blocks import Way

    return [Way(warpgroups, splits) for warpgroups in (1, 2, 3) for splits in (1, 2, 3, 4)]


@pytest.mark.parametrize("way", ways(), ids=str)
def test_any_size_and_the_same_bits_each_time(way: Any, seed: int) -> None:
    """Also rows, outputs and inputs that are no whole blocks, and fewer inputs than parts."""
    from lockstep.ops.linear.blocks import can_be_copied
    from lockstep.ops.linear.hopper import can_be_multiplied, hopper_product
    from lockstep.ops.linear.hopper_blocks import block_in

    sizes = (
        (1, 1024, 512),
        (7, 72, 1024),
        (24, 1000, 4104),
        (65, 4096, 1032),
        (130, 200, 3072),
        (192, 1536, 64),
    )
    for rows, outputs, inputs in (*sizes, (224, 328, 520), (256, 3072, 1024), (256, 8, 8)):
        block = block_in(rows, inputs, way)
        if block is None:
            continue  # parts of sums that do not fit
        x = drawn(seed, rows, 2 * inputs)[:, inputs:]
        weight, bias = drawn(seed + 1, 2 * outputs, inputs, scale=inputs**-0.5), drawn(seed + 2, 2 * outputs)
        for given in (None, bias):
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            gate, up = exact.chunk(2, -1)
            for gated, expected in ((False, exact), (True, silu(gate) * up)):
                assert can_be_copied(x) and can_be_multiplied(weight, gated=gated)
                out = hopper_product(x, weight, given, block, None, gated=gated)
                assert_near(out, expected)
                for _ in range(5):
                    assert torch.equal(hopper_product(x, weight, given, block, None, gated=gated), out)


def test_float16(seed: int) -> None:
    from lockstep.ops.linear.hopper import hopper_product
    from lockstep.ops.linear.hopper_blocks import Way, block_in

    x = drawn(seed, 100, 1024, dtype=torch.float16)
    weight = drawn(seed + 1, 400, 1024, scale=1 / 32, dtype=torch.float16)
    bias = drawn(seed + 2, 400, dtype=torch.float16)
    block = block_in(100, 1024, Way(2, 2))
    assert block is not None
    out = hopper_product(x, weight, bias, block, None)
    torch.testing.assert_close(
        out.double(), x.double() @ weight.double().T + bias.double(), rtol=2**-10, atol=2**-11
    )


def test_few_thread_blocks_take_many_turns(seed: int) -> None:
    from lockstep.ops.linear.hopper import hopper_product
    from lockstep.ops.linear.hopper_blocks import Way, block_in

    x, weight = drawn(seed, 250, 520), drawn(seed + 1, 2000, 520, scale=520**-0.5)
    for way in (Way(1, 1), Way(2, 1, 2), Way(3, 1, 3)):
        block = block_in(250, 520, way)
        assert block is not None
        for clusters in (1, 3, 7):
            assert_near(
                hopper_product(x, weight, None, block._replace(clusters=clusters), None),
                x.double() @ weight.double().T,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
def test_the_best_of_each_row_are_those_of_all_results(warpgroups: int, dtype: torch.dtype, seed: int) -> None:
    """To the bit: rows of equal results, of infinite ones and of what is no number among them, and many turns."""
    from lockstep.ops.choose_greedy.programs import choose, choose_of
    from lockstep.ops.linear.hopper import finds_best, hopper_best, hopper_product
    from lockstep.ops.linear.hopper_blocks import Way, block_in

    for rows, outputs, inputs in (
        (1, 1024, 512),
        (4, 8, 8),
        (7, 72, 1024),
        (24, 40008, 64),
        (65, 4096, 1032),
        (130, 200, 3072),
        (192, 1536, 64),
        (256, 3072, 1024),
    ):
        block = block_in(rows, inputs, Way(warpgroups, 1))
        if block is None:
            continue
        assert finds_best(block, rows) and not finds_best(block, block.rows + 1)
        x, weight = (
            drawn(seed, rows, inputs, dtype=dtype),
            drawn(seed + 1, outputs, inputs, scale=0.1, dtype=dtype),
        )
        weight[:, 0] = 1
        if rows > 3:
            x[0], x[1, 0], x[2, 0], x[3, -1] = 0, torch.inf, -torch.inf, torch.nan
        owners = torch.arange(1, rows + 1, device="cuda")
        owners[rows // 2] = 0
        kept, others = (torch.zeros(rows + 1, dtype=torch.int64, device="cuda") for _ in range(2))
        for clusters in (132, 5, 1):
            turns = block._replace(clusters=clusters)
            expected = choose(hopper_product(x, weight, None, turns, None), owners, kept)
            found = choose_of(hopper_best(x, weight, turns, None), owners, others)
            assert torch.equal(found, expected) and torch.equal(others, kept), (rows, outputs, inputs, clusters)


@pytest.mark.parametrize("rows", [2, 8, 17, 64, 130, 200])
@pytest.mark.parametrize("shape", [(1024, 2048), (576, 1536), (6144, 1024)], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(shape: tuple[int, int], rows: int, seed: int) -> None:
    from lockstep.ops.linear.kernels.cuda import linear

    x, weight = drawn(seed, rows, shape[1]), drawn(seed + 1, *shape, scale=shape[1] ** -0.5)
    others = x * 7
    others[rows // 2] = x[rows // 2]
    assert torch.equal(linear(x, weight)[rows // 2], linear(others, weight)[rows // 2])


def test_rows_that_lie_apart_or_start_anywhere(seed: int) -> None:
    """Slices of wider rows, as heads are, and memory that no engine copies from."""
    from lockstep.ops.linear.kernels.cuda import linear

    wide, weight = drawn(seed, 64, 4096), drawn(seed + 1, 1024, 2048, scale=2048**-0.5)
    for first in (0, 1024, 3, 8):
        x = wide[:, first : first + 2048]
        assert_near(linear(x, weight), x.double() @ weight.double().T)


def test_outputs_that_are_no_multiple_of_eight_are_computed_by_another(seed: int) -> None:
    from lockstep.ops.linear.kernels.cuda import linear

    x, weight = drawn(seed, 40, 512), drawn(seed + 1, 33, 512, scale=512**-0.5)
    assert_near(linear(x, weight), x.double() @ weight.double().T)


def test_one_after_the_other_without_a_kernel_between(seed: int) -> None:
    """Each reads what the one before it wrote, into memory that the one before that has read."""
    from lockstep.ops.linear.kernels.cuda import linear

    x, weights = drawn(seed, 96, 1024), [drawn(seed + at, 1024, 1024, scale=1 / 32) for at in range(1, 7)]

    def chain(*, slowly: bool) -> torch.Tensor:
        rows = x
        for weight in weights * 3:
            rows = linear(rows, weight)
            if slowly:
                torch.cuda.synchronize()
        return rows

    expected = chain(slowly=True)
    for _ in range(30):
        assert torch.equal(chain(slowly=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain(slowly=False)
    for _ in range(30):
        recorded.zero_()
        graph.replay()
        assert torch.equal(recorded, expected)


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 50, 128, 200, 256])
def test_a_chain_of_early_launches_waits_where_it_must(rows: int, seed: int) -> None:
    assert_waits(Chain(seed, rows), bound("cuda", "triton"))


def test_compiled_kernels_are_kept_and_read_again(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.ops import cuda_program
    from lockstep.ops.linear import hopper
    from lockstep.ops.linear.hopper_blocks import Way, block_in

    x, weight = drawn(seed, 40, 512), drawn(seed + 1, 64, 512, scale=512**-0.5)
    block = block_in(40, 512, Way(1, 1))
    assert block is not None
    first = hopper.hopper_product(x, weight, None, block, tmp_path)
    hopper._program.cache_clear()
    monkeypatch.setattr(cuda_program, "_compiled", None)
    assert torch.equal(hopper.hopper_product(x, weight, None, block, tmp_path), first)
    assert len(list((tmp_path / "compiled").iterdir())) == 1
