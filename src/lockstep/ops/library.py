"""Kernels as operators of torch.library, so that a compiled model calls the very kernel that an eager one does.

A compiler sees one opaque call for each bound kernel, `lockstep::{operator}_{provider}`. Its schema comes from the
contract and the annotations of the reference; the shapes and dtypes of its results come from the reference itself, run
on tensors without values. An operator exists for the kernels that were asked for, and for no others.

A weight that is no tensor, because a kernel packed it or a file holds it in integers, goes by a number: no graph of
torch could hold it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch

from lockstep.core.errors import KernelError
from lockstep.ops.contract import Argument, Contract, Kernel, Signature
from lockstep.ops.nested import with_tensors
from lockstep.ops.registry import contracts
from lockstep.ops.selection import Binding, KernelSelector

NAMESPACE = "lockstep"
Function = Callable[..., Any]


class TraceableSelector(KernelSelector):
    """Binds the same kernels for the same reasons, each as an operator that a compiler leaves whole.

    It holds the weights that are no tensors, so it must live as long as the model.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._weights = HeldWeights()

    def bind(self, op: str, where: str, signature: Signature) -> Binding:
        """See KernelSelector. Raises KernelError also when the bound kernel cannot be traced."""
        return self._traced(super().bind(op, where, signature))

    def bind_fused(
        self, op: str, where: str, signature: Signature, *, apart: str | None = None
    ) -> Binding | None:
        """See KernelSelector. A kernel that prepares a program of its own is bound as it is: it leaves nothing to
        compile. Raises KernelError also when the bound kernel cannot be traced."""
        binding = super().bind_fused(op, where, signature, apart=apart)
        return binding if binding is None or binding.kernel.opaque else self._traced(binding)

    def _traced(self, binding: Binding) -> Binding:
        device = torch.device(self._capabilities.device_type)
        return replace(binding, kernel=traced(binding.kernel, device, self._weights))


class HeldWeights:
    """Weights that are no tensors. Operators know each by its number for as long as this object lives."""

    def __init__(self) -> None:
        self._held: list[_HeldWeight] = []

    def add(self, prepared: Any, plain: Any) -> int:
        """The number of a weight as a kernel reads it; `plain` is what that was made of."""
        held = _HeldWeight(prepared, with_tensors(plain, lambda each: each.new_empty(()).expand(each.shape)))
        self._held.append(held)
        number = next(_numbers)
        _held[number] = held
        return number


@dataclass(frozen=True, eq=False)
class _HeldWeight:
    """A weight as a kernel reads it, and what it was made of without the values."""

    prepared: Any
    shape_alone: Any

    def without_values(self) -> Any:
        """What the reference takes where nothing is computed."""
        return with_tensors(
            self.shape_alone, lambda each: torch.empty(each.shape, dtype=each.dtype, device=each.device)
        )


_numbers = itertools.count(1)
_held: WeakValueDictionary[int, _HeldWeight] = WeakValueDictionary()


def _held_weight(number: int) -> _HeldWeight:
    held = _held.get(int(number))
    if held is None:
        raise KernelError(
            "a weight of a compiled model is gone: the selector that bound it must outlive the model"
        )
    return held


def traced(kernel: Kernel, device: torch.device, weights: HeldWeights) -> Kernel:
    """The kernel with operators of torch.library in the place of its functions. `device` as in `traceable`.

    A weight that it prepares to something that is no tensor becomes a number, held in `weights`.
    """
    function = traceable(kernel, device)
    if not any(_is_held(argument, kernel) for argument in contracts()[kernel.op].arguments):
        return replace(kernel, function=function)

    def prepare(plain: Any) -> int:
        return weights.add(kernel.prepare(plain) if kernel.prepare else plain, plain)

    take_rows = _registered[_name(kernel)].take_rows if kernel.take_rows else None
    return replace(kernel, function=function, prepare=prepare, take_rows=take_rows, opaque=False)


def traceable(kernel: Kernel, device: torch.device) -> Function:
    """The kernel as an operator of torch.library, registered at the first call for it.

    Takes the contract's arguments by position, numbers of HeldWeights for weights that are no tensors, and gives its
    results. `device` is one that the kernel serves: a kernel that may leave results in its arguments is tried there
    once. Raises KernelError when the contract has an argument that torch's schemas cannot express.
    """
    name = _name(kernel)
    if name not in _registered:
        _registered[name] = _Registration(name, contracts()[kernel.op], kernel, device)
    found = _registered[name]
    if found.kernel.function is not kernel.function:
        raise KernelError(f"{NAMESPACE}::{name} already stands for another kernel called {kernel.provider!r}")
    return found.call


def _name(kernel: Kernel) -> str:
    return f"{kernel.op}_{re.sub(r'[^0-9a-zA-Z_]', '_', kernel.provider)}"


def _is_held(argument: Argument, kernel: Kernel) -> bool:
    return argument.constant and (argument.opaque or kernel.opaque)


def kernels_called(graph: torch.fx.Graph) -> list[str]:
    """Names ("operator_provider") of the kernels that a traced graph calls, in order."""
    # An operator that writes may be wrapped, as the first argument of a functional call.
    said = (item for node in graph.nodes for item in (node.target, *node.args))
    ours = (op for op in said if isinstance(op, torch._ops.OpOverload) and op.namespace == NAMESPACE)
    return [op._opname for op in ours if op._opname in _registered]


class _Registration:
    """One kernel under its name in torch.library.

    An operator of torch may not return what it was given. So results that the kernel leaves in an argument are none
    of the operator's own, and `call` gives the argument in their place.
    """

    def __init__(self, name: str, contract: Contract, kernel: Kernel, device: torch.device) -> None:
        self.kernel = kernel
        self._reference = contract.reference
        self._defaults = [each.default for each in inspect.signature(contract.reference).parameters.values()]
        self._held = [at for at, argument in enumerate(contract.arguments) if _is_held(argument, kernel)]
        self._places = _places(contract, kernel, device)
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._op = self._define(name, self._schema(contract), self._run, self._fake)
        self.call: Function = self._call if any(at is not None for at in self._places) else self._op
        self.take_rows: Function | None = None
        if self._held and kernel.take_rows is not None:
            schema = "(int weight, Tensor ids) -> Tensor"
            self.take_rows = self._define(f"{name}_rows", schema, self._run_rows, self._fake_rows)

    def _define(self, name: str, schema: str, run: Function, fake: Function) -> Function:
        self._library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=self._library)
        defined: Function = getattr(getattr(torch.ops, NAMESPACE), name).default
        return defined

    def _schema(self, contract: Contract) -> str:
        """Such as "(Tensor update, Tensor(a1!) residual) -> Tensor"."""
        parameters = list(inspect.signature(self._reference).parameters)
        opaque = [
            argument.name
            for at, argument in enumerate(contract.arguments)
            if argument.opaque and at not in self._held
        ]
        if opaque:
            raise KernelError(f"operator {contract.name!r} cannot be traced: {opaque[0]} is no tensor")
        pairs = zip(parameters, contract.arguments, strict=True)
        changed = [name for name, argument in pairs if argument.written or argument.scratch]
        try:
            inferred = torch.library.infer_schema(self._numbered(), mutates_args=changed)
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise KernelError(f"operator {contract.name!r} cannot be traced: {reason}") from error
        fresh = ["Tensor" for at in self._places if at is None]
        returned = fresh[0] if len(fresh) == 1 else f"({', '.join(fresh)})"
        return f"{inferred.rpartition(' -> ')[0]} -> {returned}"

    def _numbered(self) -> Function:
        """The reference as far as its signature goes, with a number for each weight that is no tensor."""
        signature = inspect.signature(self._reference)
        parameters = list(signature.parameters.values())
        for at in self._held:
            parameters[at] = parameters[at].replace(annotation=int)
        # Annotations are text, which torch reads in the function's own module.
        likeness = FunctionType(self._reference.__code__, self._reference.__globals__)
        likeness.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return likeness

    def _with_weights(self, arguments: Sequence[Any], form: Callable[[_HeldWeight], Any]) -> list[Any]:
        """All arguments, with a form of each held weight in the place of its number."""
        # Torch leaves out what equals a default at the end; kernels need not repeat the reference's defaults.
        complete = (*arguments, *self._defaults[len(arguments) :])
        return [form(_held_weight(each)) if at in self._held else each for at, each in enumerate(complete)]

    def _run_rows(self, weight: int, ids: torch.Tensor) -> torch.Tensor:
        assert self.kernel.take_rows is not None
        return self.kernel.take_rows(_held_weight(weight).prepared, ids)

    def _fake_rows(self, weight: int, ids: torch.Tensor) -> torch.Tensor:
        num_inputs = _held_weight(weight).shape_alone.shape[-1]
        return ids.new_empty((ids.shape[0], num_inputs), dtype=torch.float32)

    def _call(self, *arguments: Any) -> Any:
        """The contract's results: the operator's own, and arguments that hold the others."""
        fresh = list(_as_tuple(self._op(*arguments)))
        results = [fresh.pop(0) if at is None else arguments[at] for at in self._places]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, *given: Any) -> Any:
        arguments = self._with_weights(given, lambda held: held.prepared)
        fresh = []
        for at, result in zip(self._places, _as_tuple(self.kernel.function(*arguments)), strict=True):
            if at is None:
                fresh.append(result.clone() if _shares_memory(result, arguments) else result)
            elif result is not arguments[at]:
                arguments[at].copy_(result)
        return _as_result(fresh)

    def _fake(self, *given: Any) -> Any:
        if not self._places:
            return None
        arguments = self._with_weights(given, lambda held: held.without_values())
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
        with_tensors(value, lambda each: each.to(device))
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
