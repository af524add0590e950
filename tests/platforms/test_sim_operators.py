"""Every operator on the simulated device: each kernel that can run there, on all cases of its contract."""

from __future__ import annotations

import random

import pytest
import torch

from lockstep.ops.suite import check, select
from lockstep.platforms.registry import load_platform

SELECTED = {selected.contract.name: selected for selected in select(load_platform("sim").capabilities())}


@pytest.mark.parametrize("op", SELECTED)
def test_operator_on_sim(op: str, sim: torch.device) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    report = check(SELECTED[op], sim, seed)
    assert [failure for kernel in report.kernels for failure in kernel.failures] == []
    assert report.kernels and report.passed
