"""The operators of the group "attention_shared", each kernel on each kind of device."""

from __future__ import annotations

import pytest
from device_operators import assert_meets_contract, operators

pytestmark = pytest.mark.suite("sim", "cuda-1", "rocm-1", "musa-1", seconds=5)


@pytest.mark.parametrize("op", operators("attention_shared"))
def test_operator(op: str, suite_platform: str) -> None:
    assert_meets_contract(op, suite_platform)
