"""Checks the kernels that a device can run, all of them or those asked for, and names the ones that it cannot."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ConfigError, KernelError, nearest
from lockstep.ops.check import KernelReport, check_kernels, check_mutants
from lockstep.ops.contract import Contract, Kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import unmet_need
from lockstep.platforms.base import Platform
from lockstep.platforms.registry import load_platform


@dataclass(frozen=True, slots=True)
class Selected:
    """One operator's kernels that will be checked, and (provider, reason) of those that cannot run here."""

    contract: Contract
    kernels: tuple[Kernel, ...]
    not_run: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """What one operator's kernels did, and which of its known-wrong versions no case rejects."""

    op: str
    kernels: tuple[KernelReport, ...]
    not_run: tuple[tuple[str, str], ...]
    num_mutants: int
    accepted_mutants: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when every kernel that ran is right and every mutant was rejected."""
        return not self.accepted_mutants and all(report.passed for report in self.kernels)

    @property
    def num_rejected(self) -> int:
        """Mutants that fall in every dtype."""
        return self.num_mutants - len({text.rpartition(" (")[0] for text in self.accepted_mutants})

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "op": self.op,
            "passed": self.passed,
            "mutants": {
                "total": self.num_mutants,
                "rejected": self.num_rejected,
                "accepted": list(self.accepted_mutants),
            },
            "kernels": [_as_json(report) for report in self.kernels],
            "not_run": [{"kernel": provider, "reason": reason} for provider, reason in self.not_run],
        }


def select(
    capabilities: Capabilities, *, op: str | None = None, provider: str | None = None
) -> tuple[Selected, ...]:
    """What a check on a device of these capabilities runs; None takes every operator, every kernel.

    Raises KernelError for a name that is not known, and for a kernel asked for by name that can run nowhere here,
    with the needs that are not met.
    """
    offered = {name: kernels(name) for name in ((op,) if op is not None else sorted(contracts()))}
    if provider is not None:
        known = sorted({kernel.provider for found in offered.values() for kernel in found})
        if provider not in known:
            of = f"operator {op!r}" if op is not None else "any operator"
            raise KernelError(
                f"no kernel of {of} is called {provider!r}{nearest(provider, known)} (known: {', '.join(known)})"
            )
    selected = []
    for name, found in offered.items():
        wanted = [kernel for kernel in found if provider in (None, kernel.provider)]
        if wanted:
            reasons = {kernel.provider: why_not(kernel, capabilities) for kernel in wanted}
            runs = tuple(kernel for kernel in wanted if reasons[kernel.provider] is None)
            not_run = tuple((each, reason) for each, reason in reasons.items() if reason is not None)
            selected.append(Selected(contracts()[name], runs, not_run))
    if provider is not None and not any(each.kernels for each in selected):
        needs = dict.fromkeys(
            f"{each.contract.name}: {reason}" for each in selected for _, reason in each.not_run
        )
        raise KernelError(f"kernel {provider!r} cannot run on {capabilities.platform}: {'; '.join(needs)}")
    return tuple(selected)


def why_not(kernel: Kernel, capabilities: Capabilities) -> str | None:
    """Why a kernel serves none of its contract's cases on such a device; None when it serves one."""
    unmet = unmet_need(kernel, capabilities)
    if unmet is not None:
        return unmet
    refusals = [kernel.refuses(case.signature) for case in contracts()[kernel.op].cases()]
    return None if None in refusals else "; ".join(dict.fromkeys(str(reason) for reason in refusals))


def device_with_values(platform: Platform) -> torch.device:
    """The platform's first device. Raises ConfigError where tensors have shapes and no values."""
    device = platform.device()
    if torch.empty(0, device=device).is_meta:
        raise ConfigError(f"platform {platform.name} computes no values, so its kernels have none to compare")
    return device


def check(selected: Selected, device: torch.device, seed: int) -> OperatorReport:
    """Runs every case of the selected kernels on `device`, and every mutant on the host."""
    contract = selected.contract
    return OperatorReport(
        contract.name,
        check_kernels(contract, selected.kernels, seed=seed, device=device),
        selected.not_run,
        len(contract.mutants),
        tuple(check_mutants(contract, seed)),
    )


def check_all(
    selection: tuple[Selected, ...], platform: Platform, seed: int, *, num_processes: int = 1
) -> Iterator[OperatorReport]:
    """One report after the other: in the selection's order, or as several processes come to them.

    Raises ConfigError where nothing can be checked; KernelError when a process dies.
    """
    device = device_with_values(platform)
    if min(num_processes, len(selection)) <= 1:
        return (check(selected, device, seed) for selected in selection)
    return _side_by_side(selection, platform.name, seed, min(num_processes, len(selection)))


def _side_by_side(
    selection: tuple[Selected, ...], platform: str, seed: int, num_processes: int
) -> Iterator[OperatorReport]:
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // num_processes)
    pool = ProcessPoolExecutor(num_processes, context, _begin, (threads,))
    try:
        # Operators with most cases first: the last to be begun should be short.
        longest = sorted(selection, key=lambda each: -sum(1 for _ in each.contract.cases()))
        begun = [
            pool.submit(_check_by_name, each.contract.name, _names(each), each.not_run, platform, seed)
            for each in longest
        ]
        for done in as_completed(begun):
            yield done.result()
    except BrokenProcessPool:
        raise KernelError(
            "a process that checked an operator died; without --jobs it dies in the operator after the last one told"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(num_threads: int) -> None:
    """Ctrl-C ends a process at once; else it would take up the next operator."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(num_threads)


def _names(selected: Selected) -> tuple[str, ...]:
    return tuple(kernel.provider for kernel in selected.kernels)


def _check_by_name(
    op: str, providers: tuple[str, ...], not_run: tuple[tuple[str, str], ...], platform: str, seed: int
) -> OperatorReport:
    """`check` in another process, which gets names only."""
    offered = {kernel.provider: kernel for kernel in kernels(op)}
    selected = Selected(contracts()[op], tuple(offered[name] for name in providers), not_run)
    return check(selected, device_with_values(load_platform(platform)), seed)


def passed(reports: list[OperatorReport]) -> bool:
    """True when something ran and nothing failed."""
    return any(report.kernels for report in reports) and all(report.passed for report in reports)


def _as_json(report: KernelReport) -> dict[str, Any]:
    is_finite = report.worst_share != float("inf")
    return {
        "name": report.provider,
        "passed": report.passed,
        "cases": report.num_cases,
        "worst_share": report.worst_share if is_finite else None,
        "worst_case": report.worst_case,
        "refused": [{"case": case, "reason": reason} for case, reason in report.refused],
        "failures": list(report.failures),
    }
