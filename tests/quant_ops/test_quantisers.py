"""The quantisers against numpy, a table of the format, and what their contracts promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import quant_properties as properties
import torch

from lockstep.core.errors import KernelError
from lockstep.ops.check import check_kernel, check_mutants
from lockstep.ops.contract import Kernel
from lockstep.ops.per_token_group_quant_fp8.reference import new_scales
from lockstep.ops.per_token_group_quant_fp8.tiles import WIDEST_GROUP, tile_of
from lockstep.ops.registry import contracts, kernels

pytestmark = pytest.mark.suite("cpu")

OPS = ("per_token_quant_fp8", "per_token_group_quant_fp8", "per_token_group_quant_int8")
GROUP_OPS = OPS[1:]
HERE = ("reference", "torch")
SEED = 20250


def kernel(op: str, provider: str) -> Kernel:
    return next(kernel for kernel in kernels(op) if kernel.provider == provider)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_table_is_that_of_the_format() -> None:
    """Its ends and a few entries as published, and torch's own reading of every code."""
    table = properties.e4m3_table()
    assert table[1] == 2.0**-9 and table[7] == 0.875 * 2.0**-6 and table[8] == 2.0**-6 and table[-1] == 448
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(codes.double().numpy(), table)
    assert np.array_equal(
        properties.e4m3_bits(np.array([0.0, -0.0, 17.0, 19.0, -448.0])), [0, 128, 0x58, 0x5A, 0xFE]
    )


@pytest.mark.parametrize("provider", HERE)
@pytest.mark.parametrize("op", GROUP_OPS)
def test_group_quantisers(op: str, provider: str) -> None:
    properties.check_all(kernel(op, provider).function, "cpu", SEED)


@pytest.mark.parametrize("provider", HERE)
def test_rows_are_groups(provider: str) -> None:
    by_row, by_group = (kernel(op, provider).function for op in OPS[:2])
    x = torch.randn(7, 577, generator=torch.Generator().manual_seed(SEED))
    for found, wanted in zip(by_row(x), by_group(x, 577, False, False), strict=True):
        assert (
            torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)) and found.stride() == wanted.stride()
        )
    bits, scale = properties.expected(x, 577, torch.float8_e4m3fn, False)
    assert np.array_equal(by_row(x)[0].view(torch.uint8).numpy(), bits)
    assert np.array_equal(by_row(x)[1].numpy(), scale)


@pytest.mark.parametrize("provider", HERE)
@pytest.mark.parametrize("op", OPS)
def test_kernels_meet_their_contracts(op: str, provider: str) -> None:
    report = check_kernel(contracts()[op], kernel(op, provider), seed=SEED)
    print(f"seed {SEED}")
    assert report.passed and not report.refused, report.failures


@pytest.mark.parametrize("op", OPS)
def test_mutants_fall_in_every_input_dtype(op: str) -> None:
    """Not only over all cases together, as the check asks, but over those of one dtype of x."""
    for dtype in properties.DTYPES:
        cases = [case for case in contracts()[op].cases() if case.signature["dtype"] == dtype]
        assert check_mutants(replace(contracts()[op], cases=partial(iter, cases)), SEED) == [], dtype


@pytest.mark.parametrize("op", GROUP_OPS)
def test_zero_rows_have_the_smallest_scale(op: str) -> None:
    for provider in HERE:
        codes, scale = kernel(op, provider).function(torch.zeros(2, 128), 64, False, True)
        assert bool((codes.float() == 0).all()) and bool((scale == 2.0**-40).all())


@pytest.mark.parametrize("provider", HERE)
@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("group", [0, -64, 100, 256])
def test_a_group_that_does_not_fit_is_refused(op: str, provider: str, group: int) -> None:
    with pytest.raises(KernelError, match=f"groups of {group} do not divide rows of 128"):
        kernel(op, provider).function(torch.zeros(2, 128), group, False, False)


@pytest.mark.parametrize("op", GROUP_OPS)
def test_shapes_alone_suffice(op: str) -> None:
    """On the meta device results have the shapes, dtypes and strides that values would have."""
    x = torch.randn(3, 5, 256)
    for provider in HERE:
        for column_major in (False, True):
            real = kernel(op, provider).function(x, 64, column_major, True)
            shapes = kernel(op, provider).function(x.to("meta"), 64, column_major, True)
            for found, wanted in zip(shapes, real, strict=True):
                assert (found.shape, found.dtype, found.stride()) == (
                    wanted.shape,
                    wanted.dtype,
                    wanted.stride(),
                )


def test_columns_start_every_16_bytes() -> None:
    for rows in range(1, 20):
        scale = new_scales(torch.Size((rows, 3)), True, torch.device("cpu"))
        starts = {scale[:, group].data_ptr() % 16 - scale.data_ptr() % 16 for group in range(3)}
        assert starts == {0} and scale.stride(1) - rows < 4


@pytest.mark.parametrize("op", OPS)
def test_the_triton_kernel_says_what_it_needs(op: str) -> None:
    found = kernel(op, "triton")
    assert found.platforms == {"cuda", "rocm", "musa"} and "triton" in found.features
    assert ("fp8" in found.features) == op.endswith("fp8")
    fits = {"dtype": torch.bfloat16, "width": 4096, "group": 128, "column_major": True, "ue8m0": False}
    assert found.refuses(fits) is None
    assert "32768 elements, not 40000" in str(found.refuses({**fits, "width": 40000, "group": 40000}))


@pytest.mark.parametrize("rows", [1, 3, 64, 16384, 10**6])
@pytest.mark.parametrize("width", [64, 128, 577, 7168, WIDEST_GROUP])
def test_tiles_hold_their_groups(rows: int, width: int) -> None:
    for group in {64, 128, width} if width % 128 == 0 else {width}:
        tile = tile_of(rows, width // group, group)
        elements = tile.rows * tile.groups * tile.block
        assert tile.block >= group and all(number & (number - 1) == 0 for number in tile)
        assert elements <= 8192 or (tile.rows, tile.groups) == (1, 1)
        assert 1 <= tile.num_warps <= 32 and elements <= tile.num_warps * 32 * 32
        assert tile.rows < 2 * rows and tile.groups < 2 * (width // group)


def test_large_inputs_get_large_tiles_and_small_ones_many_programs() -> None:
    large, small = tile_of(16384, 56, 128), tile_of(16, 56, 128)
    assert large.rows * large.groups * large.block == 8192 and large.rows == large.groups == 8
    assert 16 * 56 / (small.rows * small.groups) >= 100


def unaware(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], change: str) -> properties.Quantise:
    """A quantiser with one flaw."""

    def quantise(
        x: torch.Tensor, group: int, column_major: bool, ue8m0: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if change == "drops NaN":
            x = x.nan_to_num(0.0)
        if change == "takes column-major for row-major":
            return function(x, group, False, ue8m0)
        codes, scale = function(x, group, column_major, ue8m0)
        return codes, scale * (1 + 2.0**-23) if change == "scale one unit off" else scale

    return quantise


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ("drops NaN", lambda flawed: properties.check_bad_values(flawed, "cpu")),
        ("takes column-major for row-major", lambda flawed: properties.check_layout(flawed, "cpu")),
        ("scale one unit off", lambda flawed: properties.check_bits(flawed, "cpu", SEED)),
    ],
)
@pytest.mark.parametrize("op", GROUP_OPS)
def test_the_properties_can_fail(op: str, change: str, check: Callable[[properties.Quantise], None]) -> None:
    with pytest.raises(AssertionError):
        check(unaware(kernel(op, "reference").function, change))
