"""Kernels as operators of torch.library, so that a compiled model calls the very kernel that an eager one does.

A compiler sees one opaque call for each bound kernel, `lockstep::{operator}_{provider}`. Its schema comes from the
contract and the annotations of the reference; the shapes and dtypes of its results come from the reference itself, run
on tensors without values. An operator exists for the kernels that were asked for, and for no others.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lockstep.core.errors import KernelError
from lockstep.ops.contract import Contract, Kernel, Signature
from lockstep.ops.registry import contracts
from lockstep.ops.selection import Binding, KernelSelector

NAMESPACE = "lockstep"
Function = Callable[..., Any]


class TraceableSelector(KernelSelector):
    """Binds the same kernels for the same reasons, each as an operator that a compiler leaves whole."""

    def _refusal(self, kernel: Kernel, signature: Signature) -> str | None:
        if kernel.opaque:
            return "its prepared weight is no tensor: a compiled graph cannot hold it"
        return super()._refusal(kernel, signature)

    def bind(self, op: str, where: str, signature: Signature, *, strict: bool = True) -> Binding:
        """See KernelSelector. Raises KernelError also when the bound kernel cannot be traced."""
        binding = super().bind(op, where, signature, strict=strict)
        function = traceable(binding.kernel, torch.device(self._capabilities.device_type))
        return replace(binding, kernel=replace(binding.kernel, function=function))


def traceable(kernel: Kernel, device: torch.device) -> Function:
    """The kernel as an operator of torch.library, registered at the first call for it.

    Takes the contract's arguments by position and gives its results. `device` is one that the kernel serves: a kernel
    that may leave results in its arguments is tried there once. Raises KernelError when the contract has an argument
    that torch's schemas cannot express.
    """
    name = f"{kernel.op}_{re.sub(r'[^0-9a-zA-Z_]', '_', kernel.provider)}"
    if name not in _registered:
        _registered[name] = _Registration(name, contracts()[kernel.op], kernel, device)
    found = _registered[name]
    if found.kernel.function is not kernel.function:
        raise KernelError(f"{NAMESPACE}::{name} already stands for another kernel called {kernel.provider!r}")
    return found.call


def kernels_called(graph: torch.fx.Graph) -> list[str]:
    """Names ("operator_provider") of the kernels that a traced graph calls, in order."""
    # An operator that writes may be wrapped, as the first argument of a functional call.
    said = (item for node in graph.nodes for item in (node.target, *node.args))
    return [op._opname for op in said if isinstance(op, torch._ops.OpOverload) and op.namespace == NAMESPACE]


class _Registration:
    """One kernel under its name in torch.library.

    An operator of torch may not return what it was given. So results that the kernel leaves in an argument are none
    of the operator's own, and `call` gives the argument in their place.
    """

    def __init__(self, name: str, contract: Contract, kernel: Kernel, device: torch.device) -> None:
        self.kernel = kernel
        self._reference = contract.reference
        self._places = _places(contract, kernel, device)
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._library.define(name + self._schema(contract), tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=self._library)
        self._op: Function = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.call: Function = self._call if any(at is not None for at in self._places) else self._op

    def _schema(self, contract: Contract) -> str:
        """Such as "(Tensor update, Tensor(a1!) residual) -> Tensor"."""
        parameters = list(inspect.signature(self._reference).parameters)
        opaque = [argument.name for argument in contract.arguments if argument.opaque]
        if opaque:
            raise KernelError(f"operator {contract.name!r} cannot be traced: {opaque[0]} is no tensor")
        pairs = zip(parameters, contract.arguments, strict=True)
        changed = [name for name, argument in pairs if argument.written or argument.scratch]
        try:
            inferred = torch.library.infer_schema(self._reference, mutates_args=changed)
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise KernelError(f"operator {contract.name!r} cannot be traced: {reason}") from error
        fresh = ["Tensor" for at in self._places if at is None]
        returned = fresh[0] if len(fresh) == 1 else f"({', '.join(fresh)})"
        return f"{inferred.rpartition(' -> ')[0]} -> {returned}"

    def _call(self, *arguments: Any) -> Any:
        """The contract's results: the operator's own, and arguments that hold the others."""
        fresh = list(_as_tuple(self._op(*arguments)))
        results = [fresh.pop(0) if at is None else arguments[at] for at in self._places]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, *arguments: Any) -> Any:
        fresh = []
        for at, result in zip(self._places, _as_tuple(self.kernel.function(*arguments)), strict=True):
            if at is None:
                fresh.append(result.clone() if _shares_memory(result, arguments) else result)
            elif result is not arguments[at]:
                arguments[at].copy_(result)
        return _as_result(fresh)

    def _fake(self, *arguments: Any) -> Any:
        if not self._places:
            return None
        results = zip(self._places, _as_tuple(self._reference(*arguments)), strict=True)
        return _as_result([result for at, result in results if at is None])


_registered: dict[str, _Registration] = {}


def _places(contract: Contract, kernel: Kernel, device: torch.device) -> tuple[int | None, ...]:
    """For each result the number of the argument that the kernel leaves it in, or None for a tensor of its own."""
    may_hold = [at for at, argument in enumerate(contract.arguments) if argument.written or argument.scratch]
    if not may_hold or not contract.returns:
        return (None,) * len(contract.returns)
    case = next((case for case in contract.cases() if kernel.refuses(case.signature) is None), None)
    if case is None:
        return (None,) * len(contract.returns)
    arguments = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in case.make(torch.Generator().manual_seed(0))
    ]
    for at, argument in enumerate(contract.arguments):
        if argument.constant and kernel.prepare is not None:
            arguments[at] = kernel.prepare(arguments[at])
    results = _as_tuple(kernel.function(*arguments))
    return tuple(next((at for at in may_hold if result is arguments[at]), None) for result in results)


def _shares_memory(result: torch.Tensor, arguments: Sequence[Any]) -> bool:
    """True when a result that should be new is an argument or a part of one."""
    address = result.untyped_storage().data_ptr()
    stored = (each for each in arguments if isinstance(each, torch.Tensor) and torch._C._has_storage(each))
    return address != 0 and any(each.untyped_storage().data_ptr() == address for each in stored)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else () if results is None else (results,)


def _as_result(results: Sequence[torch.Tensor]) -> Any:
    return None if not results else results[0] if len(results) == 1 else tuple(results)
