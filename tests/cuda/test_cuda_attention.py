"""Attention on an NVIDIA GPU beyond its operators: what the backend plans, and graphs of it."""

from __future__ import annotations

from types import ModuleType

import pytest

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=40)


def test_the_paged_backend_meets_the_contract(
    attention_checks: ModuleType, seed: int, suite_platform: str
) -> None:
    planned_by = attention_checks.kernel("attention_extend", "triton")
    tested = attention_checks.backend_kernel(attention_checks.triton_backend(), planned_by)
    assert attention_checks.meets_contract(tested, suite_platform, seed)


def test_replayed_graphs_give_the_eager_bits(attention_checks: ModuleType, suite_platform: str) -> None:
    """Fewer sequences than the graph has, other lengths, wider page tables."""
    assert attention_checks.replays_give_eager_bits(suite_platform)
