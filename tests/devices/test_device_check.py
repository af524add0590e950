"""What the check of operators sees of a kernel's writes is the same on every kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lockstep.ops.check import check_kernel
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import contracts
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu", "sim", "cuda-1", "rocm-1", "musa-1", seconds=5)

NORM, ADD_NORM = contracts()["rms_norm"], contracts()["add_rms_norm"]


def failures(op: str, function: Callable[..., Any], platform: str) -> tuple[str, ...]:
    kernel = Kernel(op=op, provider="test", function=function)
    found = check_kernel(contracts()[op], kernel, seed=0, device=load_platform(platform).device()).failures
    print(*found[:4], sep="\n")
    return found


def test_the_end_of_a_row_is_where_the_next_argument_begins(suite_platform: str) -> None:
    """What shares memory in a case shares it on the device, and behind the last row lies nobody's."""

    def one_past_each_row(update: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Any:
        out = ADD_NORM.reference(update, residual, *rest)
        if residual.dim() == 2:
            after = residual.storage_offset() + residual.shape[1]
            residual.as_strided((len(residual), 1), (residual.stride(0), 1), after).fill_(7)
        return out

    found = failures("add_rms_norm", one_past_each_row, suite_platform)
    assert any("halves of one tensor: argument update was changed" in text for text in found)
    assert any("(1, 64) scale 1.0: memory around residual was written" in text for text in found)


def test_gaps_between_rows_stay_as_they_were(suite_platform: str) -> None:
    def fills_gaps(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = NORM.reference(x, weight, eps)
        if x.dim() == 3:
            x.as_strided((*x.shape[:2], x.stride(1)), x.stride(), x.storage_offset())[..., x.shape[2] :] = 0
        return out

    found = failures("rms_norm", fills_gaps, suite_platform)
    assert any("strided heads: memory around x was written" in text for text in found)
    assert all("strided" in text and "memory around x was written" in text for text in found)


def test_a_buffer_that_every_call_returns(suite_platform: str) -> None:
    buffers: dict[Any, torch.Tensor] = {}

    def returns_one_buffer(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = NORM.reference(x, weight, eps)
        return buffers.setdefault((x.shape, x.dtype), torch.empty_like(out)).copy_(out)

    found = failures("rms_norm", returns_one_buffer, suite_platform)
    assert found and all("the out of an earlier call was written" in text for text in found)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_the_reference_writes_nowhere_else(op: str, suite_platform: str) -> None:
    assert failures(op, contracts()[op].reference, suite_platform) == ()
