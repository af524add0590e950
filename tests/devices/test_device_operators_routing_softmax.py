"""The operators of the group "routing_softmax", each kernel on each kind of device."""

from __future__ import annotations

import pytest
from device_operators import assert_meets_contract, operators

pytestmark = pytest.mark.suite("sim", "cuda-1", "rocm-1", "musa-1", seconds=2)


@pytest.mark.parametrize("op", operators("routing_softmax"))
def test_operator(op: str, suite_platform: str) -> None:
    assert_meets_contract(op, suite_platform)
