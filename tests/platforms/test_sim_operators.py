"""Every operator on the simulated device: each kernel that can run there, on all cases of its contract."""

from __future__ import annotations

import random

import pytest
import torch

from lockstep.ops.check import check_kernel
from lockstep.ops.suite import select
from lockstep.platforms.registry import load_platform

SELECTED = {selected.contract.name: selected for selected in select(load_platform("sim").capabilities())}


@pytest.mark.parametrize("op", SELECTED)
def test_operator_on_sim(op: str, sim: torch.device) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    selected = SELECTED[op]
    reports = [check_kernel(selected.contract, kernel, seed=seed, device=sim) for kernel in selected.kernels]
    assert [failure for report in reports for failure in report.failures] == []
    assert reports and all(report.passed for report in reports)
