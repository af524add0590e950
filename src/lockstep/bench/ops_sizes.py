"""Whether the calls that somebody wants timed fit into memory, known before the first of them is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lockstep.config.memory import human_bytes
from lockstep.core.errors import ConfigError
from lockstep.ops.contract import Case, Workload
from lockstep.platforms.base import Platform


def require_fitting(workload: Workload, sizes: Sequence[int], platform: Platform) -> None:
    """Raises ConfigError for a size whose arguments alone are more than the device can hold.

    Arguments grow evenly with the size; how much, the contract's two smallest sizes tell.
    """
    available_bytes = platform.memory().available_bytes
    small, *larger = sorted(workload.sizes)[:2]
    fixed_bytes = num_bytes(workload.case(small))
    each_bytes = fixed_bytes / small
    if larger:
        each_bytes = (num_bytes(workload.case(larger[0])) - fixed_bytes) / (larger[0] - small)
    for size in sizes:
        needed_bytes = round(fixed_bytes + each_bytes * (size - small))
        if needed_bytes > available_bytes:
            raise ConfigError(
                f"--sizes {size}: the arguments of one call are {human_bytes(needed_bytes)}, and "
                f"{human_bytes(available_bytes)} are free; take a smaller one"
            )


def num_bytes(case: Case) -> int:
    """Bytes of a call's tensors. They are not made, unless their sizes depend on values."""
    generator = torch.Generator().manual_seed(0)
    try:
        with FakeTensorMode():
            made = case.make(generator)
    except DataDependentOutputException:
        made = case.make(generator)
    return sum(value.nbytes for value in made if isinstance(value, torch.Tensor))
