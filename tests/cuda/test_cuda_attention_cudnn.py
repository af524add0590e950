"""cuDNN's attention on an NVIDIA GPU: the operator, and a backend that decodes by it."""

from __future__ import annotations

from types import ModuleType

import pytest
from library_attention import assert_right, compiled

from lockstep.attention.cudnn_part import CudnnDecode
from lockstep.attention.paged_backend import PagedBackend
from lockstep.attention.table_parts import ExtendTables

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "cudnn"), seconds=30)


def test_the_operator_is_right(attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    assert_right(compiled(attention_checks.kernel("attention_decode", "cudnn")), suite_platform, seed)


def test_the_backend_is_right(attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    decode = compiled(attention_checks.kernel("attention_decode", "cudnn"))
    extend = attention_checks.kernel("attention_extend", "triton")
    backend = PagedBackend(CudnnDecode(decode), ExtendTables(extend))
    assert_right(attention_checks.backend_kernel(backend, extend), suite_platform, seed)
