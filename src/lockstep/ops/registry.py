"""Finds every operator folder and every kernel file in it, and the kernels that other packages offer.

Adding an operator or a kernel touches no other file. A mistake in this package is an error; a package from outside that
makes one is left out, with a line that names it, and everything else goes on.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import lockstep.ops
from lockstep.core.errors import KernelError, nearest
from lockstep.ops.contract import Contract, Kernel

ENTRY_POINT_GROUP = "lockstep.kernels"

_LOG = logging.getLogger("lockstep.ops")


@cache
def contracts() -> dict[str, Contract]:
    """Every operator's contract by name, from the folders of this package. Raises KernelError for a folder without."""
    folders = [module.name for module in pkgutil.iter_modules(lockstep.ops.__path__) if module.ispkg]
    return {name: _contract_of(name) for name in folders}


@cache
def kernels(op: str) -> tuple[Kernel, ...]:
    """Every kernel of an operator: its reference, its `kernels/` files, then those that other packages offer.

    Raises KernelError naming the nearest operator when `op` is unknown, and for a file that offers no kernels of it.
    """
    contract = contracts().get(op)
    if contract is None:
        raise KernelError(
            f"unknown operator {op!r}{nearest(op, contracts())} (known: {', '.join(contracts())})"
        )
    return (*_own_kernels(contract), *(kernel for kernel in _kernels_from_outside() if kernel.op == op))


def require_providers(owner: str, names: Iterable[str]) -> None:
    """Raises KernelError for a name of a preference that no kernel of any operator has, naming the nearest.

    `owner` states the preference; it may name itself before it has kernels.
    """
    known = {kernel.provider for op in contracts() for kernel in kernels(op)} | {owner}
    for name in names:
        if name not in known:
            raise KernelError(
                f"platform {owner} prefers kernels of {name!r}, and there are none{nearest(name, known)} "
                f"(known: {', '.join(sorted(known))})"
            )


def _contract_of(name: str) -> Contract:
    path = f"lockstep.ops.{name}.contract"
    contract = getattr(_imported(path), "CONTRACT", None)
    if not isinstance(contract, Contract):
        raise KernelError(f"{path} has no CONTRACT; an operator's folder says there what it means")
    if contract.name != name:
        raise KernelError(f"{path} is called {contract.name!r}; an operator has the name of its folder")
    return contract


def _own_kernels(contract: Contract) -> list[Kernel]:
    op = contract.name
    # References are written for reading: they may look at values, and those of attention and stores do.
    reference = Kernel(
        op=op, provider="reference", function=contract.reference, verified_on=("cpu",), asks_host=True
    )
    found = [reference]
    package = _imported(f"lockstep.ops.{op}.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        path = f"{package.__name__}.{module.name}"
        offered = _checked(getattr(_imported(path), "KERNELS", None), path)
        strangers = [kernel.op for kernel in offered if kernel.op != op]
        if strangers:
            raise KernelError(f"{path} has a kernel of {strangers[0]!r}; it lies in the folder of {op!r}")
        found.extend(offered)
    twice = _twice(found)
    if twice is not None:
        raise KernelError(f"operator {op!r} has two kernels of one provider: {twice}")
    return found


def _imported(path: str) -> ModuleType:
    """A module of this package. Raises KernelError when it is not there; what fails inside of it is its own error."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise KernelError(f"{path} is missing; an operator's folder has contract.py and kernels/") from error


@cache
def _kernels_from_outside() -> tuple[Kernel, ...]:
    """Kernels of installed packages, without those of packages that offer something else; a line says which and why."""
    taken: list[Kernel] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            taken += _offered(point, taken)
        except KernelError as error:
            package = point.dist.name if point.dist is not None else point.value
            _LOG.warning("the kernels of package %s are left out: %s", package, error)
    return tuple(taken)


def _offered(point: EntryPoint, taken: list[Kernel]) -> tuple[Kernel, ...]:
    try:
        value = point.load()
    except Exception as error:  # it is another package's module: nothing is known of what it may raise
        raise KernelError(f"{point.value} cannot be imported: {type(error).__name__}: {error}") from error
    offered = _checked(value, point.value)
    for kernel in offered:
        if kernel.op not in contracts():
            raise KernelError(
                f"{kernel.provider!r} is for unknown operator {kernel.op!r}{nearest(kernel.op, contracts())}"
            )
    for op in dict.fromkeys(kernel.op for kernel in offered):
        both = (kernel for kernel in (*taken, *offered) if kernel.op == op)
        twice = _twice([*_own_kernels(contracts()[op]), *both])
        if twice is not None:
            raise KernelError(f"operator {op!r} would have two kernels of one provider: {twice}")
    return offered


def _checked(value: Any, path: str) -> tuple[Kernel, ...]:
    if not isinstance(value, tuple) or not all(isinstance(each, Kernel) for each in value):
        what = "no KERNELS" if value is None else f"{value!r}"
        raise KernelError(f"{path} is to offer a tuple of kernels, and has {what}")
    return value


def _twice(found: Iterable[Kernel]) -> str | None:
    """The first provider that there are two kernels of."""
    seen: set[str] = set()
    for kernel in found:
        if kernel.provider in seen:
            return kernel.provider
        seen.add(kernel.provider)
    return None
