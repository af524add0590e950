"""Every operator on each kind of device again, with other random values every time."""

from __future__ import annotations

import pytest
from device_operators import GROUPS, assert_meets_contract, fresh_seed, operators

from lockstep.ops.check import check_mutants
from lockstep.ops.registry import contracts

pytestmark = pytest.mark.suite("sim", "cuda-1", "rocm-1", "musa-1", stage="nightly", seconds=300)

NUM_ROUNDS = 3


@pytest.mark.parametrize("op", [op for group in (*GROUPS, "others") for op in operators(group)])
def test_operator(op: str, suite_platform: str) -> None:
    for _ in range(NUM_ROUNDS):
        assert_meets_contract(op, suite_platform)
        assert check_mutants(contracts()[op], fresh_seed()) == []
