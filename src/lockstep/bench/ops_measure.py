"""Timing the kernels of one operator, each after its results were compared with the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lockstep.bench.ops_limits import MachineLimits
from lockstep.bench.ops_timing import Timing, time_calls
from lockstep.core.errors import KernelError, nearest
from lockstep.ops.check import NamedTensors, error_share, outcome
from lockstep.ops.contract import Contract, Kernel, Tolerance, Workload
from lockstep.ops.nested import with_tensors
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import unmet_need
from lockstep.platforms.base import Platform

COMPILED = "torch_compile"
"""The provider that is torch.compile of the operator's reference."""

_ACCEPTED = 2.0
"""The reference and a kernel may both be one tolerance away from exact maths, to either side."""
_COMPARED_AT_ONCE = 2**24


@dataclass(frozen=True, slots=True)
class Measurement:
    """One provider at one size. `error_share` is its distance from the reference in tolerances."""

    size: int
    provider: str
    timing: Timing
    num_bytes: int
    num_flops: int
    error_share: float

    def share_of(self, limits: MachineLimits) -> float:
        """The part of the machine's limit that the call reaches."""
        return limits.shortest_s(self.num_bytes, self.num_flops) / self.timing.seconds.median

    def is_cached(self, limits: MachineLimits) -> bool:
        """Whether all the calls that were timed in turn fit a cache together, so that it may have served them."""
        return limits.fits_cache(self.num_bytes * self.timing.num_calls)

    def as_json(self, limits: MachineLimits) -> dict[str, Any]:
        """Everything, for programs."""
        median_s = self.timing.seconds.median
        return {
            "size": self.size,
            "provider": self.provider,
            "seconds": asdict(self.timing.seconds),
            "num_calls": self.timing.num_calls,
            "num_repeats": self.timing.num_repeats,
            "method": self.timing.method,
            "bytes": self.num_bytes,
            "flops": self.num_flops,
            "bytes_per_s": self.num_bytes / median_s,
            "flops_per_s": self.num_flops / median_s,
            "share_of_limit": self.share_of(limits),
            "fits_cache": self.is_cached(limits),
            "error_share": self.error_share,
        }


@dataclass(slots=True)
class Measurements:
    """What was measured, what could not run (provider, or provider at size -> reason), and what is wrong."""

    done: list[Measurement] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def workload_of(op: str) -> tuple[Contract, Workload]:
    """An operator's contract and what it is timed with. Raises KernelError for an unknown one, or one without."""
    timed = sorted(name for name, contract in contracts().items() if contract.workload is not None)
    contract = contracts().get(op)
    if contract is None:
        raise KernelError(f"unknown operator {op!r}{nearest(op, timed)} (known: {', '.join(timed)})")
    if contract.workload is None:
        raise KernelError(f"operator {op!r} states no workload to time; those that do: {', '.join(timed)}")
    return contract, contract.workload


def providers_of(contract: Contract, names: Sequence[str] | None) -> list[Kernel]:
    """The operator's kernels and its compiled reference, or those of them that are named, in that order.

    Raises KernelError for a name that is neither.
    """
    compiled = torch.compile(contract.reference, dynamic=False)
    offered = [*kernels(contract.name), Kernel(op=contract.name, provider=COMPILED, function=compiled)]
    by_name = {kernel.provider: kernel for kernel in offered}
    for name in names or ():
        if name not in by_name:
            raise KernelError(
                f"operator {contract.name!r} has no provider {name!r}{nearest(name, by_name)} "
                f"(known: {', '.join(by_name)})"
            )
    return offered if names is None else [by_name[name] for name in dict.fromkeys(names)]


def measure(
    contract: Contract,
    workload: Workload,
    providers: Sequence[Kernel],
    platform: Platform,
    sizes: Sequence[int],
    seed: int,
    on_size: Callable[[int], None] = lambda size: None,
) -> Measurements:
    """Every provider at every size. A provider that is wrong at one size is not timed there."""
    found = Measurements()
    able = []
    for kernel in providers:
        unmet = unmet_need(kernel, platform.capabilities())
        if unmet is None:
            able.append(kernel)
        else:
            found.not_run[kernel.provider] = unmet
    for size in sizes if able else ():
        trial = _Trial(contract, workload, platform, size, seed)
        for kernel in able:
            trial.run(kernel, found)
        on_size(size)
    return found


class _Trial:
    """The call of one size, with what the reference makes of it."""

    def __init__(
        self, contract: Contract, workload: Workload, platform: Platform, size: int, seed: int
    ) -> None:
        self._contract = contract
        self._platform = platform
        self._size = size
        case = workload.case(size)
        self._signature = case.signature
        device = platform.device()
        made = case.make(torch.Generator().manual_seed(seed))
        self._arguments = [with_tensors(value, lambda each: each.to(device)) for value in made]
        self._expected = outcome(contract, contract.reference, self._fresh())
        results = (value for _, value in self._expected)
        self._num_bytes = workload.bytes_moved(self._arguments, results)
        self._num_flops = workload.flops(self._arguments)

    def run(self, kernel: Kernel, found: Measurements) -> None:
        """Compares, times, and writes down what came of it."""
        where = f"{kernel.provider} at {self._size}"
        reason = kernel.refuses(self._signature)
        if reason is not None:
            found.not_run[where] = reason
            return
        try:
            share = self._worst_share(outcome(self._contract, kernel.function, self._fresh(kernel)))
            if share > _ACCEPTED:
                found.wrong[where] = (
                    f"off by {share:.3g} tolerances from the reference, {_ACCEPTED:g} are accepted"
                )
                return
            timing = time_calls(
                self._platform,
                lambda: self._new_call(kernel),
                self._num_bytes,
                asks_host=kernel.asks_host,
            )
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            # No compiler on this machine is no fault of an operator.
            (found.not_run if kernel.provider == COMPILED else found.wrong)[where] = text
            return
        found.done.append(
            Measurement(self._size, kernel.provider, timing, self._num_bytes, self._num_flops, share)
        )

    def _fresh(self, kernel: Kernel | None = None) -> list[Any]:
        """Arguments of their own memory, weights prepared as the kernel wants them."""
        values = [with_tensors(value, torch.clone) for value in self._arguments]
        if kernel is None or kernel.prepare is None:
            return values
        pairs = zip(self._contract.arguments, values, strict=True)
        return [kernel.prepare(value) if argument.constant else value for argument, value in pairs]

    def _new_call(self, kernel: Kernel) -> Callable[[], Any]:
        arguments = self._fresh(kernel)
        return lambda: kernel.function(*arguments)

    def _worst_share(self, found: NamedTensors) -> float:
        """The largest error in tolerances; infinite where a result has another shape or dtype."""
        worst = 0.0
        for (name, value), (_, expected) in zip(found, self._expected, strict=True):
            if value.shape != expected.shape or value.dtype != expected.dtype:
                return math.inf
            tolerance = self._contract.accepted(name, expected.dtype, self._expected[0][1].dtype)
            worst = max(worst, *_shares(value, expected, tolerance), 0.0)
        return worst


def _shares(value: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Iterator[float]:
    """Part by part: in float64 a large result would not fit beside itself."""
    parts = zip(
        value.reshape(-1).split(_COMPARED_AT_ONCE), expected.reshape(-1).split(_COMPARED_AT_ONCE), strict=True
    )
    return (error_share(part, wanted, tolerance) for part, wanted in parts)
