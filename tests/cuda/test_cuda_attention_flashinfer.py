"""FlashInfer on an NVIDIA GPU: operators, backend and replayed graphs. Compiles what is not compiled yet."""

from __future__ import annotations

from types import ModuleType

import pytest
from library_attention import LAYERS, assert_right, compiled

from lockstep.attention.flashinfer_parts import FlashInferDecode, FlashInferExtend
from lockstep.attention.paged_backend import PagedBackend

pytestmark = pytest.mark.suite("cuda-1", needs=("triton", "flashinfer"), seconds=200)


def backend(checks: ModuleType) -> PagedBackend:
    decode, extend = (
        compiled(checks.kernel(op, "flashinfer")) for op in ("attention_decode", "attention_extend")
    )
    return PagedBackend(FlashInferDecode(decode), FlashInferExtend(extend))


@pytest.mark.parametrize("op", ["attention_decode", "attention_extend"])
def test_operators_are_right(op: str, attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    assert_right(compiled(attention_checks.kernel(op, "flashinfer")), suite_platform, seed)


def test_the_backend_is_right(attention_checks: ModuleType, seed: int, suite_platform: str) -> None:
    planned_by = attention_checks.kernel("attention_extend", "flashinfer")
    assert_right(attention_checks.backend_kernel(backend(attention_checks), planned_by), suite_platform, seed)


def test_replayed_graphs_give_the_eager_bits(attention_checks: ModuleType, suite_platform: str) -> None:
    for layer in LAYERS[:3]:
        assert attention_checks.replays_give_eager_bits(suite_platform, backend(attention_checks), layer)
