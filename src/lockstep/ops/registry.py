"""Finds every operator folder and every kernel file in it. Adding one touches no other file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

import lockstep.ops
from lockstep.core.errors import KernelError, nearest
from lockstep.ops.contract import Contract, Kernel

ENTRY_POINT_GROUP = "lockstep.kernels"


@cache
def contracts() -> dict[str, Contract]:
    """Every operator's contract by name, from the folders of this package."""
    found: dict[str, Contract] = {}
    for module in pkgutil.iter_modules(lockstep.ops.__path__):
        if module.ispkg:
            contract = importlib.import_module(f"lockstep.ops.{module.name}.contract").CONTRACT
            found[contract.name] = contract
    return found


@cache
def kernels(op: str) -> tuple[Kernel, ...]:
    """Every kernel of an operator: its reference, its `kernels/` files, then those that other packages offer.

    Raises KernelError naming the nearest operator when `op` is unknown.
    """
    contract = contracts().get(op)
    if contract is None:
        raise KernelError(
            f"unknown operator {op!r}{nearest(op, contracts())} (known: {', '.join(contracts())})"
        )
    # References are written for reading: they may look at values, and those of attention and stores do.
    reference = Kernel(
        op=op, provider="reference", function=contract.reference, verified_on=("cpu",), asks_host=True
    )
    found = [reference]
    package = importlib.import_module(f"lockstep.ops.{op}.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        found.extend(importlib.import_module(f"{package.__name__}.{module.name}").KERNELS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        found.extend(kernel for kernel in point.load() if kernel.op == op)
    providers = [kernel.provider for kernel in found]
    if len(set(providers)) != len(providers):
        raise KernelError(f"operator {op!r} has two kernels of one provider: {', '.join(providers)}")
    return tuple(found)
