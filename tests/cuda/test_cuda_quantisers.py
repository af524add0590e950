"""Quantisation on an NVIDIA GPU beyond its operators: properties, very large inputs, graphs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "fp8"), seconds=40)

GROUPED = ("per_token_group_quant_fp8", "per_token_group_quant_int8")


@pytest.mark.parametrize("op", GROUPED)
def test_what_every_quantiser_must_do(
    op: str, quantiser_checks: ModuleType, seed: int, suite_platform: str
) -> None:
    """Against maths in numpy, by each kernel that runs here."""
    here = load_platform(suite_platform).capabilities()
    tested = quantiser_checks.kernels_here(op, here)
    assert len(tested) >= 2
    for kernel in tested:
        print(kernel.provider)
        quantiser_checks.properties.check_all(kernel.function, suite_platform, seed)


@pytest.mark.parametrize("op", GROUPED)
def test_more_than_two_to_the_31_elements(op: str, quantiser_checks: ModuleType, suite_platform: str) -> None:
    wrong = quantiser_checks.reaches_past_2_to_31(
        triton_kernel(quantiser_checks, op, suite_platform), suite_platform
    )
    torch.cuda.empty_cache()
    assert wrong is None, wrong


@pytest.mark.parametrize("op", [*GROUPED, "per_token_quant_fp8", "scaled_mm_fp8"])
def test_a_graph_replays_with_other_values(
    op: str, quantiser_checks: ModuleType, seed: int, suite_platform: str
) -> None:
    torch.manual_seed(seed)
    if op == "scaled_mm_fp8":
        pair = [quantiser_checks.matrices(17, 512, 384, "block", suite_platform) for _ in range(2)]
    else:
        rest = (128, True, True) if op in GROUPED else ()
        pair = [(torch.randn(33, 1024, device=suite_platform).bfloat16(), *rest) for _ in range(2)]
    wrong = quantiser_checks.replays(triton_kernel(quantiser_checks, op, suite_platform), *pair)
    assert wrong is None, wrong


def triton_kernel(checks: ModuleType, op: str, platform: str) -> object:
    here = load_platform(platform).capabilities()
    return next(kernel for kernel in checks.kernels_here(op, here) if kernel.provider == "triton")
