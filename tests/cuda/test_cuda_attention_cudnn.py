"""cuDNN's attention on an NVIDIA GPU: operators and backend."""

from __future__ import annotations

from types import ModuleType

import pytest
from library_attention import assert_right, compiled

from lockstep.attention.cudnn_parts import CudnnPart
from lockstep.attention.paged_backend import PagedBackend

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "cudnn"), seconds=30)


def backend(checks: ModuleType) -> PagedBackend:
    decode, extend = (compiled(checks.kernel(op, "cudnn")) for op in ("attention_decode", "attention_extend"))
    return PagedBackend(CudnnPart(decode), CudnnPart(extend))


@pytest.mark.parametrize("op", ["attention_decode", "attention_extend"])
def test_operators_are_right(op: str, attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    assert_right(compiled(attention_checks.kernel(op, "cudnn")), suite_platform, seed)


def test_the_backend_is_right(attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    planned_by = attention_checks.kernel("attention_extend", "cudnn")
    assert_right(attention_checks.backend_kernel(backend(attention_checks), planned_by), suite_platform, seed)
