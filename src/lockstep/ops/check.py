"""Checks a kernel against its contract: every case, against the reference in float64 maths.

A case fails when a result is off by more than the tolerance, has another shape or dtype, depends on memory that
nobody wrote, or lies where a later call writes, and when an argument changes that the contract does not give away or
memory that is no argument.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.core.errors import KernelError
from lockstep.ops.check_memory import CallMemory, is_poison, poison
from lockstep.ops.contract import Case, Contract, Kernel, Tolerance

_Function = Callable[..., Any]
NamedTensors = list[tuple[str, torch.Tensor]]
_EXACT = Tolerance(0, 0)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What one kernel did on its contract's cases.

    `worst_share` is the largest error seen as a share of what is accepted: 1 is the limit. `refused` pairs a
    case's name with the kernel's reason. A report without a single case that ran has failed.
    """

    op: str
    provider: str
    seed: int
    num_cases: int
    worst_share: float
    worst_case: str
    refused: tuple[tuple[str, str], ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when every case that the kernel accepts came out right."""
        return self.num_cases > 0 and not self.failures


def check_kernel(
    contract: Contract, kernel: Kernel, *, seed: int, device: torch.device | str = "cpu"
) -> KernelReport:
    """What `check_kernels` says of a single kernel."""
    (report,) = check_kernels(contract, (kernel,), seed=seed, device=device)
    return report


def check_kernels(
    contract: Contract, kernels: Sequence[Kernel], *, seed: int, device: torch.device | str = "cpu"
) -> tuple[KernelReport, ...]:
    """Runs every case on `device` by each kernel that accepts it, with weights prepared as a model would.

    Each case runs twice, the second time with NaN in all memory that the kernel allocates; the first call's results
    are kept and must not be touched by it. A kernel that raises fails the case. Raises KernelError when the contract
    itself is unfit (no tolerance, nothing to prepare).
    """
    found = [_Findings() for _ in kernels]
    for case in contract.cases():
        trial: _Trial | None = None
        for kernel, findings in zip(kernels, found, strict=True):
            reason = kernel.refuses(case.signature)
            if reason is not None:
                findings.refused.append((case.name, reason))
                continue
            # What is expected takes longer than most kernels do: it is computed once for all of them.
            trial = trial or _Trial(contract, case, seed, torch.device(device))
            findings.run(trial, case.name, kernel)
    return tuple(
        findings.report(contract.name, kernel.provider, seed)
        for kernel, findings in zip(kernels, found, strict=True)
    )


def check_mutants(contract: Contract, seed: int) -> list[str]:
    """The known-wrong versions that no case rejects, as "mutant (dtype)": each must fall in every dtype.

    A contract without a mutant proves nothing and is named too. A mutant that raises is itself wrong, and the
    error passes through.
    """
    if not contract.mutants:
        return [f"{contract.name} has no mutants"]
    rejected: dict[str, dict[torch.dtype, bool]] = {name: {} for name in contract.mutants}
    for case in contract.cases():
        trial = _Trial(contract, case, seed, torch.device("cpu"))
        for name, mutant in contract.mutants.items():
            if not rejected[name].get(trial.dtype):
                share, _ = trial.judge(mutant, None, nullcontext(), [])
                rejected[name][trial.dtype] = share > 1
    return [
        f"{name} ({dtype})" for name, by_dtype in rejected.items() for dtype, was in by_dtype.items() if not was
    ]


@dataclass(slots=True)
class _Findings:
    """What is known of a kernel so far."""

    num_cases: int = 0
    worst: tuple[float, str] = (0.0, "")
    refused: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, trial: _Trial, name: str, kernel: Kernel) -> None:
        """The case of this name."""
        self.num_cases += 1
        earlier: NamedTensors = []
        for mode, what in ((nullcontext(), ""), (_PoisonedAllocations(), " with NaN in fresh memory")):
            try:
                share, found = trial.judge(kernel.function, kernel.prepare, mode, earlier)
            except KernelError:
                raise
            except Exception as error:
                share, found = math.inf, [f"raised {type(error).__name__}: {error}"]
            self.worst = max(self.worst, (share, name))
            self.failures.extend(f"{name}{what}: {text}" for text in found)

    def report(self, op: str, provider: str, seed: int) -> KernelReport:
        return KernelReport(
            op, provider, seed, self.num_cases, *self.worst, tuple(self.refused), tuple(self.failures)
        )


class _Trial:
    """One case, its expected values, and the verdict on a function that should give them."""

    def __init__(self, contract: Contract, case: Case, seed: int, device: torch.device) -> None:
        self._contract = contract
        self._device = device
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {case.name}".encode()))
        self._memory = CallMemory(contract.arguments, case.make(generator))
        self._typed = outcome(contract, contract.reference, self._memory.place("cpu").arguments)
        self.dtype = self._typed[0][1].dtype
        if self.dtype not in contract.tolerance:
            raise KernelError(f"operator {contract.name!r} states no tolerance for {self.dtype}")
        exact = all(self._tolerance(name, value) == _EXACT for name, value in self._typed)
        self._expected = self._typed if exact else self._in_float64()

    def judge(
        self,
        function: _Function,
        prepare: _Function | None,
        mode: AbstractContextManager[Any],
        earlier: NamedTensors,
    ) -> tuple[float, list[str]]:
        """The largest error as a share of the tolerance, and what is wrong in words.

        `earlier` are poisoned results of the call before, which this one must not touch; then those of this one.
        """
        placed = self._memory.place(self._device)
        given = list(placed.arguments)
        if prepare is not None:
            self._prepare(given, prepare)
        with mode:
            found = outcome(self._contract, function, given)
        problems = [*placed.changes()]
        problems += [
            f"the {name} of an earlier call was written" for name, value in earlier if not is_poison(value)
        ]
        worst = 0.0
        for (name, value), (_, typed), (_, wide) in zip(found, self._typed, self._expected, strict=True):
            if value.shape != typed.shape or value.dtype != typed.dtype:
                got, wanted = ((tuple(each.shape), each.dtype) for each in (value, typed))
                problems.append(f"{name} is {got}, not {wanted}")
                worst = math.inf
                continue
            tolerance = self._tolerance(name, typed)
            # Where nothing may be off, rounding is part of the meaning, and float64 has none.
            share = error_share(value.cpu(), typed if tolerance == _EXACT else wide, tolerance)
            worst = max(worst, share)
            if share > 1:
                problems.append(f"{name} is off by {share:.3g} times what is accepted")
        earlier[:] = [(name, poison(value)) for name, value in found[: len(self._contract.returns)]]
        return worst, problems

    def _tolerance(self, name: str, typed: torch.Tensor) -> Tolerance:
        return self._contract.accepted(name, typed.dtype, self.dtype)

    def _in_float64(self) -> NamedTensors:
        arguments = [_widened(value) for value in self._memory.place("cpu").arguments]
        with _WideStaysWide():
            return outcome(self._contract, self._contract.reference, arguments)

    def _prepare(self, given: list[Any], prepare: _Function) -> None:
        constant = [index for index, argument in enumerate(self._contract.arguments) if argument.constant]
        if not constant:
            raise KernelError(f"operator {self._contract.name!r} marks no constant argument to prepare")
        for index in constant:
            given[index] = prepare(given[index])


def error_share(value: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> float:
    """max |value - expected| / (absolute + relative * |expected|); infinite where one of them alone is no number."""
    if value.numel() == 0 or (value.dtype == expected.dtype and torch.equal(value, expected)):
        return 0.0
    value, expected = value.double(), expected.double()
    error = (value - expected).abs().masked_fill(value == expected, 0.0)
    accepted = tolerance.absolute + tolerance.relative * expected.abs()
    share = (error / accepted).masked_fill(error == 0, 0.0)
    return math.inf if bool(share.isnan().any()) else float(share.max())


def outcome(contract: Contract, function: _Function, arguments: Sequence[Any]) -> NamedTensors:
    """What a call gives: its results, then the arguments that it must have written."""
    out = function(*arguments)
    results = () if not contract.returns else out if isinstance(out, tuple) else (out,)
    named = [(text.partition("[")[0], value) for text, value in zip(contract.returns, results, strict=True)]
    pairs = zip(contract.arguments, arguments, strict=False)
    return named + [(spec.name, value) for spec, value in pairs if spec.written]


def _widened(value: Any) -> Any:
    """Floating tensors and dtypes in float64, anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class _WideStaysWide(TorchFunctionMode):
    """References say `.float()` for "float32 at least"; values in float64 stay what they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class _PoisonedAllocations(TorchDispatchMode):
    """Fresh memory holds NaN, or the largest integer: a result that was never computed shows."""

    _ALLOCATES = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return poison(out) if func._schema.name in self._ALLOCATES else out
