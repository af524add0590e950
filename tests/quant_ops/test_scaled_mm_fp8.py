"""Scaled products against float64 sums, and the tolerance against matrix units that round more or less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import KernelError
from lockstep.ops.check import check_kernel, check_mutants
from lockstep.ops.contract import Case, Contract, Kernel
from lockstep.ops.per_token_group_quant_fp8.reference import per_token_group_quant_fp8
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.scaled_mm_fp8.tiles import tile_of
from lockstep.ops.selection import KernelSelector

pytestmark = pytest.mark.suite("cpu")

CONTRACT = contracts()["scaled_mm_fp8"]
HERE = ("reference", "torch")
SEED = 4


def kernel(provider: str) -> Kernel:
    return next(kernel for kernel in kernels("scaled_mm_fp8") if kernel.provider == provider)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def by_the_definition(a: np.ndarray, b: np.ndarray, a_scale: np.ndarray, b_scale: np.ndarray) -> np.ndarray:
    """One result at a time, each product with the scales that its place in the blocks names."""
    out = np.zeros((len(a), len(b)))
    for row in range(len(a)):
        for output in range(len(b)):
            for input in range(a.shape[1]):
                of_a = a_scale[row if len(a_scale) > 1 else 0, input // 128 if a_scale.shape[1] > 1 else 0]
                at = output if len(b_scale) == len(b) else output // 128
                of_b = b_scale[at if len(b_scale) > 1 else 0, input // 128 if b_scale.shape[1] > 1 else 0]
                out[row, output] += a[row, input] * of_a * b[output, input] * of_b
    return out


@pytest.mark.parametrize("provider", HERE)
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
def test_each_kind_of_scale(provider: str, scaling: str) -> None:
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED)
    rows, outputs, inputs = 3, 130, 200
    a, b = ((torch.randn(size, inputs, generator=g) * 50).to(torch.float8_e4m3fn) for size in (rows, outputs))
    shapes = {"tensor": ((1, 1), (1, 1)), "row": ((3, 1), (130, 1)), "block": ((3, 2), (2, 2))}[scaling]
    a_scale, b_scale = (torch.rand(*shape, generator=g) + 0.01 for shape in shapes)
    exact = by_the_definition(*(value.double().numpy() for value in (a, b, a_scale, b_scale)))
    found = kernel(provider).function(a, b, a_scale, b_scale, None, torch.float32)
    size = np.abs(a.double().numpy()) @ np.abs(b.double().numpy()).T * float(a_scale.max() * b_scale.max())
    assert float(np.max(np.abs(found.double().numpy() - exact) / size)) < 200 * 2.0**-24
    bias = torch.randn(outputs, generator=g)
    shifted = kernel(provider).function(a, b, a_scale, b_scale, bias, torch.float32)
    assert float((shifted - found - bias).abs().max()) < 1e-5 * float(found.abs().max())


@pytest.mark.parametrize("provider", HERE)
def test_kernels_meet_the_contract(provider: str) -> None:
    print(f"seed {SEED}")
    report = check_kernel(CONTRACT, kernel(provider), seed=SEED)
    assert report.passed and not report.refused, report.failures


def test_mutants_fall() -> None:
    print(f"seed {SEED}")
    assert check_mutants(CONTRACT, SEED) == []


def test_quantised_matrices_multiply_to_about_the_product() -> None:
    """Both quantisers' layouts feed it; the error is that of two roundings to four bits in each product."""
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED)
    x, w = torch.randn(9, 512, generator=g), torch.randn(256, 512, generator=g)
    exact = x.double() @ w.double().T
    blocks = w.unflatten(1, (4, 128)).unflatten(0, (2, 128)).abs().amax((1, 3)) / 448
    codes = (w / blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
    for column_major in (False, True):
        a, a_scale = per_token_group_quant_fp8(x, 128, column_major, False)
        for provider in HERE:
            found = kernel(provider).function(a, codes, a_scale, blocks, None, torch.float32)
            error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            assert 0.01 < error < 0.05, error


def matrix_unit(bits: int) -> Callable[..., torch.Tensor]:
    """Products of a step of 32 inputs, and the sum so far, cut off `bits` - 1 below the largest's power of two.

    A block of 128 inputs is summed so, blocks in float64. Source of the behaviour: DeepSeek-AI, DeepSeek-V3 Technical
    Report, 2024, 3.5.2.
    """

    def scaled_mm(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        rows, inputs = a.shape
        outputs, out = b.shape[0], torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
        a, b = a.double(), b.double()
        for start in range(0, inputs, 128):
            total = torch.zeros(rows, outputs, 1, dtype=torch.float64)
            for step in range(start, min(start + 128, inputs), 32):
                at = slice(step, min(step + 32, start + 128))
                terms = torch.cat([a[:, None, at] * b[None, :, at], total], -1)
                unit = torch.exp2(torch.frexp(terms.abs().amax(-1, keepdim=True))[1].double() - bits)
                total = ((terms / unit).trunc() * unit).sum(-1, keepdim=True)
            block = start // 128
            of_a, of_b = (s[:, block if s.shape[1] > 1 else 0].double() for s in (a_scale, b_scale))
            if len(of_b) not in (1, outputs):
                of_b = of_b.repeat_interleave(128)[:outputs]
            out += total[..., 0] * of_a[:, None] * of_b
        return (out if bias is None else out + bias).to(dtype)

    return scaled_mm


def cases_of(dtype: torch.dtype) -> Contract:
    """The contract with its cases of one dtype, but for the one with very many outputs."""

    def cases() -> Iterator[Case]:
        of_dtype = (case for case in CONTRACT.cases() if case.signature["dtype"] == dtype)
        return (case for case in of_dtype if case.signature["outputs"] < 1000)

    return replace(CONTRACT, cases=cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tolerance_admits_14_bits_and_not_12(dtype: torch.dtype) -> None:
    shares = {}
    for bits in (14, 12):
        unit = Kernel(op="scaled_mm_fp8", provider=f"{bits} bits", function=matrix_unit(bits))
        shares[bits] = check_kernel(cases_of(dtype), unit, seed=SEED).worst_share
    print(f"seed {SEED}: {shares}")
    assert 0.1 < shares[14] <= 1 < shares[12]


def test_float32_results_are_not_summed_to_14_bits() -> None:
    unit = Kernel(op="scaled_mm_fp8", provider="14 bits", function=matrix_unit(14))
    assert check_kernel(cases_of(torch.float32), unit, seed=SEED).worst_share > 10


def signature(**changes: Any) -> dict[str, Any]:
    return {"dtype": torch.bfloat16, "inputs": 512, "outputs": 256, "scaling": "row", "bias": False, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"scaling": "tensor", "dtype": torch.float16}, None),
        ({"scaling": "block"}, "per tensor or per row, not per block"),
        ({"dtype": torch.float32}, "sums too coarsely for results in torch.float32"),
        ({"inputs": 520}, "multiples of 16, not 520 inputs"),
        ({"outputs": 33}, "multiples of 16, not 512 inputs and 33 outputs"),
    ],
)
def test_what_cublas_takes(changes: dict[str, Any], reason: str | None) -> None:
    found = kernel("cublas").refuses(signature(**changes))
    assert found == reason if reason is None else reason in str(found)


def test_old_cards_are_told_what_they_lack() -> None:
    preference = ("cublas", "triton", "torch")
    old = Capabilities(platform="cuda", device_type="cuda", device_name="old", features=frozenset({"triton"}))
    binding = KernelSelector(old, preference).bind("scaled_mm_fp8", "here", signature())
    assert binding.kernel.provider == "torch"
    assert binding.refused == (("cublas", "the device lacks fp8"), ("triton", "the device lacks fp8"))
    new = Capabilities(
        platform="cuda", device_type="cuda", device_name="n", features=frozenset({"triton", "fp8"})
    )
    assert (
        KernelSelector(new, preference).bind("scaled_mm_fp8", "here", signature()).kernel.provider == "cublas"
    )
    blocks = KernelSelector(new, preference).bind("scaled_mm_fp8", "here", signature(scaling="block"))
    assert blocks.kernel.provider == "triton"
    with pytest.raises(KernelError, match="no signature entry 'scalings'; did you mean 'scaling'"):
        KernelSelector(new, preference).bind("scaled_mm_fp8", "here", {**signature(), "scalings": "row"})


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 1000, 100_000])
@pytest.mark.parametrize("outputs", [1, 33, 576, 7168, 129_280])
def test_tiles_fit(rows: int, outputs: int) -> None:
    tile = tile_of(rows, outputs)
    assert tile.rows >= 16 and tile.outputs >= 16 and 128 % tile.outputs == 0
    assert (tile.rows + tile.outputs) * 128 * tile.num_stages <= 160 * 1024
    programs = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    assert programs >= min(112, -(-rows // 64) * -(-outputs // 64))
