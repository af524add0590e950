"""The check itself: each kind of wrong kernel is caught, and said so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.core.errors import KernelError
from lockstep.ops.check import check_kernel, check_mutants, error_share
from lockstep.ops.contract import FLOAT32_UNIT, Kernel, Signature, Tolerance, rounded
from lockstep.ops.registry import contracts

pytestmark = pytest.mark.suite("cpu")

NORM = contracts()["rms_norm"]
ADD_NORM = contracts()["add_rms_norm"]
STORE = contracts()["kv_store"]
LINEAR = contracts()["linear"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def norm_kernel(function: Callable[..., Any], **fields: Any) -> Kernel:
    return Kernel(op="rms_norm", provider="test", function=function, **fields)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In numpy's float64, another implementation than the reference."""
    wide = x.double().numpy()
    scale = 1 / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps)
    return torch.from_numpy(wide * scale * weight.double().numpy()).to(x.dtype)


def failures_of(kernel: Kernel) -> tuple[str, ...]:
    return check_kernel(contracts()[kernel.op], kernel, seed=0).failures


def test_an_independent_kernel_passes() -> None:
    report = check_kernel(NORM, norm_kernel(exact_norm), seed=0)
    assert report.passed and report.num_cases == len(list(NORM.cases())) and report.worst_share < 1


def test_an_error_just_above_the_tolerance_fails() -> None:
    """A float32 result off by a thousandth of a per mille is caught; within its roundings it is not."""

    def off_by(share: float) -> Callable[..., Any]:
        return lambda x, weight, eps: (exact_norm(x.double(), weight, eps) * (1 + share)).to(x.dtype)

    limit = NORM.tolerance[torch.float32].relative
    assert not failures_of(norm_kernel(off_by(0.5 * limit)))
    assert any("float32" in text and "off by" in text for text in failures_of(norm_kernel(off_by(1.5 * limit))))


def test_fresh_memory_may_not_be_read() -> None:
    def leaves_a_column(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        out[..., :-1] = exact_norm(x, weight, eps)[..., :-1]
        return out

    def adds_to_garbage(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return exact_norm(x, weight, eps) + 0 * x.new_empty(x.shape)

    for wrong in (leaves_a_column, adds_to_garbage):
        assert any("with NaN in fresh memory" in text for text in failures_of(norm_kernel(wrong)))


def test_arguments_that_are_not_given_away_stay() -> None:
    def spoils_input(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = exact_norm(x, weight, eps)
        x.mul_(2)
        return out

    assert any("argument x was changed" in text for text in failures_of(norm_kernel(spoils_input)))


def test_results_outlive_the_next_call() -> None:
    """One buffer that every call returns holds the last call's results alone."""
    buffers: dict[Any, torch.Tensor] = {}

    def returns_one_buffer(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        buffer = buffers.setdefault((x.shape, x.dtype), torch.zeros(x.shape, dtype=x.dtype))
        return buffer.copy_(exact_norm(x, weight, eps))

    found = failures_of(norm_kernel(returns_one_buffer))
    assert found and all("the out of an earlier call was written" in text for text in found)


def test_scratch_may_be_spoiled_and_written_results_may_not() -> None:
    def spoils_residual(update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        out = ADD_NORM.reference(update, residual.clone(), weight, eps)
        residual.fill_(torch.nan)
        return out

    assert not failures_of(Kernel(op="add_rms_norm", provider="test", function=spoils_residual))

    def one_slot_more(k: Any, v: Any, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor) -> None:
        STORE.reference(k, v, k_pool, v_pool, slots)
        free = sorted(set(range(k_pool.shape[1] * k_pool.shape[2])) - set(slots.tolist()))[-1]
        v_pool.flatten(1, 2)[:, free] += 1

    found = failures_of(Kernel(op="kv_store", provider="test", function=one_slot_more))
    assert found and all("v_pool is off" in text for text in found)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda x, weight, eps: exact_norm(x, weight, eps).float(), "not ("),
        (lambda x, weight, eps: exact_norm(x, weight, eps)[None], "not ("),
        (lambda x, weight, eps: 1 / 0, "raised ZeroDivisionError"),
        (lambda x, weight, eps: exact_norm(x, weight, eps) * torch.nan, "off by inf"),
    ],
)
def test_shape_dtype_exceptions_and_nan(wrong: Callable[..., Any], says: str) -> None:
    assert any(says in text for text in failures_of(norm_kernel(wrong)))


def test_gaps_between_rows_are_poison() -> None:
    """A kernel that takes rows for side by side reads NaN."""

    def ignores_strides(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        packed = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
        return exact_norm(packed, weight, eps)

    found = failures_of(norm_kernel(ignores_strides))
    assert found and all("strided" in text for text in found)


def test_a_check_that_runs_nothing_has_failed() -> None:
    def never(signature: Signature) -> str | None:
        return "never today"

    report = check_kernel(NORM, norm_kernel(exact_norm, refuses=never), seed=0)
    assert not report.passed and not report.failures
    assert {reason for _, reason in report.refused} == {"never today"}


def test_prepared_weights_reach_the_kernel() -> None:
    def on_transposed(
        x: torch.Tensor, prepared: dict[str, torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        out = x.double() @ prepared["IO"].double()
        return (out if bias is None else out + bias.double()).to(x.dtype)

    good = Kernel(op="linear", provider="test", function=on_transposed, prepare=lambda weight: {"IO": weight.T})
    assert not failures_of(good)
    turned = replace(good, prepare=lambda weight: {"IO": weight.flip(0).T})
    assert failures_of(turned)
    unmarked = replace(LINEAR, arguments=tuple(replace(each, constant=False) for each in LINEAR.arguments))
    with pytest.raises(KernelError, match="no constant argument"):
        check_kernel(unmarked, good, seed=0)


def test_mutants_that_survive_are_named() -> None:
    same = replace(NORM, mutants={"nothing wrong": NORM.reference, **NORM.mutants})
    assert check_mutants(same, 0) == [f"nothing wrong ({dtype})" for dtype in NORM.tolerance]
    blind = replace(NORM, tolerance=dict.fromkeys(NORM.tolerance, Tolerance(1e3, 0)))
    assert len(check_mutants(blind, 0)) == len(NORM.mutants) * len(NORM.tolerance)
    only_half = lambda x, weight, eps: exact_norm(x, weight, eps) * (2 if x.dtype == torch.float16 else 1)  # noqa: E731
    assert check_mutants(replace(NORM, mutants={"half": only_half}), 0) == [
        "half (torch.float32)",
        "half (torch.bfloat16)",
    ]
    assert check_mutants(replace(NORM, mutants={}), 0) == ["rms_norm has no mutants"]


def test_a_dtype_without_a_tolerance_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"no tolerance for torch\.bfloat16"):
        check_kernel(
            replace(NORM, tolerance={torch.float32: NORM.tolerance[torch.float32]}),
            norm_kernel(exact_norm),
            seed=0,
        )


def test_the_same_seed_makes_the_same_cases() -> None:
    first, again, other = (
        check_kernel(NORM, norm_kernel(exact_norm), seed=seed).worst_share for seed in (7, 7, 8)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("value", "expected", "share"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.3], [1.0], 1.0),
        ([-2.0], [-2.4], 0.4 / 0.44),
        ([math.inf], [math.inf], 0.0),
        ([math.inf], [1.0], math.inf),
        ([1.0], [math.inf], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_error_share(value: list[float], expected: list[float], share: float) -> None:
    tolerance = Tolerance(absolute=0.2, relative=0.1)
    found = error_share(torch.tensor(value).double(), torch.tensor(expected).double(), tolerance)
    assert found == pytest.approx(share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_fits_its_tolerance_and_two_do_not(dtype: torch.dtype) -> None:
    """Against the dtype's own rounding of float64 values, subnormal ones included."""
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(200_000, generator=generator, dtype=torch.float64)
    exact *= torch.logspace(-9, 4, 200_000, dtype=torch.float64)
    tolerance = rounded(1, maths=0)[dtype]
    assert 0.9 < error_share(exact.to(dtype), exact, tolerance) <= 1
    twice = (exact.to(dtype).double() * 0.73).to(dtype)
    assert error_share(twice, exact * 0.73, tolerance) > 1
    assert error_share(twice, exact * 0.73, rounded(2, maths=0)[dtype]) <= 1


def test_the_float32_unit_is_half_an_ulp() -> None:
    assert torch.finfo(torch.float32).eps / 2 == FLOAT32_UNIT


def test_each_result_has_the_tolerance_of_its_dtype() -> None:
    """Coarse codes do not excuse a coarse scale; what no dtype excuses keeps its bits."""

    def quantise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(-1) / 448 + eps
        return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale.float()

    def of_scale(share: float) -> Kernel:
        def function(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scale = quantise(x, weight, eps)
            return codes, scale * (1 + share)

        return norm_kernel(function)

    exact = replace(
        NORM,
        returns=("codes[row, width]", "scale[row]"),
        reference=quantise,
        tolerance={torch.float8_e4m3fn: Tolerance(0, 0), torch.float32: Tolerance(0, 1e-6)},
    )
    assert check_kernel(exact, of_scale(0.0), seed=0).passed
    failures = check_kernel(exact, of_scale(0.01), seed=0).failures
    assert failures and all("scale is off" in text for text in failures)
    coarse = replace(exact, tolerance={torch.float8_e4m3fn: Tolerance(0, 0.1)})
    assert check_kernel(coarse, of_scale(0.01), seed=0).passed
