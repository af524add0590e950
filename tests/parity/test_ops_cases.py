"""The cases of every contract hold what breaks kernels, as far as it applies to the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lockstep.ops.cases import DTYPES
from lockstep.ops.contract import Case, Contract
from lockstep.ops.registry import contracts

pytestmark = pytest.mark.suite("cpu")

Calls = list[tuple[Case, tuple[Any, ...]]]

WIDEST = 16384
"""Hidden sizes that models have reach it."""
MOST_HEADS = 128
GQA_RATIOS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16}
LARGE = 100.0

WIDTHS = {"width", "input", "2 * width"}
HEADS = {"head", "kv_head", "query, key and value head"}
WHOLE_MODELS = {"decoder_decode", "decoder_forward"}
"""Their sizes are those of a small decoder: each part has a contract of its own."""

EVERY = pytest.mark.parametrize("contract", contracts().values(), ids=lambda contract: contract.name)


def calls_of(contract: Contract) -> Calls:
    generator = torch.Generator().manual_seed(0)
    return [(case, case.make(generator)) for case in contract.cases()]


def inputs_of(calls: Calls) -> list[torch.Tensor]:
    """The first tensor of each call: what the operator computes on."""
    return [next(value for value in given if isinstance(value, torch.Tensor)) for _, given in calls]


def largest(contract: Contract, calls: Calls, axes: set[str]) -> int | None:
    """Of all dims that an argument names so; None where none does."""
    sizes = [
        size
        for _, given in calls
        for spec, value in zip(contract.arguments, given, strict=True)
        if isinstance(value, torch.Tensor)
        for axis, size in zip(reversed(spec.axes), reversed(value.shape), strict=False)
        if axis in axes
    ]
    return max(sizes, default=None)


def result_dtype(contract: Contract, given: tuple[Any, ...]) -> torch.dtype:
    """Of the first result, or of the first argument that is written when there is none."""
    out = contract.reference(*given)
    if not contract.returns:
        out = next(value for spec, value in zip(contract.arguments, given, strict=False) if spec.written)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first.dtype


@EVERY
def test_cases_cover_what_breaks_kernels(contract: Contract) -> None:
    """No rows, one row, sizes that are no multiple of a vector, every dtype."""
    calls = calls_of(contract)
    tensors = [[value for value in given if isinstance(value, torch.Tensor)] for _, given in calls]
    assert len({case.name for case, _ in calls}) == len(calls), "two cases share a name"
    assert {0, 1} <= {first.shape[0] for first in inputs_of(calls)}
    assert any(size % 8 for each in tensors for tensor in each for size in tensor.shape if size > 8)
    dtypes = {tensor.dtype for each in tensors for tensor in each if tensor.is_floating_point()}
    assert not dtypes or dtypes >= set(DTYPES)
    assert {result_dtype(contract, given) for _, given in calls} <= set(contract.tolerance)
    for case, given in calls:
        assert set(case.signature) == set(contract.signature), case.name
        assert len(given) == len(contract.arguments), case.name


@EVERY
def test_cases_reach_the_sizes_of_models(contract: Contract) -> None:
    if contract.name in WHOLE_MODELS:
        return
    calls = calls_of(contract)
    width, heads = largest(contract, calls, WIDTHS), largest(contract, calls, HEADS)
    assert width is None or width >= WIDEST
    assert heads is None or heads >= MOST_HEADS
    signatures = [case.signature for case, _ in calls]
    if {"heads", "kv_heads", "window"} <= set(contract.signature):
        for dtype in DTYPES:
            found = {each["heads"] // each["kv_heads"] for each in signatures if each["dtype"] == dtype}
            assert found >= GQA_RATIOS, dtype


@EVERY
def test_cases_hold_zeros_large_values_and_gaps(contract: Contract) -> None:
    """Rows and heads are cut from packed products; activations of models reach thousands."""
    inputs = inputs_of(calls_of(contract))
    floats = [each for each in inputs if each.is_floating_point()]
    for dtype in {each.dtype for each in floats}:
        values = [each.float() for each in floats if each.dtype == dtype and each.numel()]
        assert any(not each.any() for each in values), f"no zeros in {dtype}"
        assert any(bool((each.abs() >= LARGE).any()) for each in values), f"no large values in {dtype}"
    # Logits are a product's whole result and never cut.
    if floats and contract.name != "top_k_top_p_sample":
        assert any(not each.is_contiguous() for each in floats)


@EVERY
def test_cases_of_rows_with_any_number_of_dims_have_several(contract: Contract) -> None:
    if "any number of dims" in contract.arguments[0].note:
        assert {each.dim() for each in inputs_of(calls_of(contract))} >= {2, 3}


def test_rotated_heads_and_stored_ones_go_from_every_dtype_to_every_one() -> None:
    """The stream may be wider than the pool, and the pool than the stream."""
    stored = {
        (case.signature["dtype"], case.signature["pool_dtype"]) for case, _ in calls_of(contracts()["kv_store"])
    }
    assert stored == {(dtype, pool_dtype) for dtype in DTYPES for pool_dtype in DTYPES}
    rotated = {
        (case.signature["dtype"], case.signature["out_dtype"]) for case, _ in calls_of(contracts()["rope"])
    }
    assert rotated >= {pair for pair in stored if torch.float32 in pair or pair[0] == pair[1]}
