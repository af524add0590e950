"""Every kernel of every operator that runs here against its contract; every known-wrong version is rejected."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from lockstep.core.capabilities import Capabilities
from lockstep.native import usable_instruction_sets
from lockstep.ops.check import KernelReport, check_kernels, check_mutants
from lockstep.ops.contract import Case, Contract, Kernel, Tolerance
from lockstep.ops.registry import contracts, kernels
from lockstep.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.suite("cpu")

SEEDS = (0, 1, 20260)
HERE = CpuPlatform().capabilities()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def runs_on(kernel: Kernel, device: Capabilities) -> bool:
    has_features = all(device.has(feature) for feature in kernel.features)
    return has_features and (not kernel.platforms or device.platform in kernel.platforms)


def result_dtype(contract: Contract, case: Case) -> torch.dtype:
    """Of the first result, or of the first argument that is written when there is none."""
    arguments = case.make(torch.Generator().manual_seed(0))
    out = contract.reference(*arguments)
    if not contract.returns:
        out = next(value for spec, value in zip(contract.arguments, arguments, strict=False) if spec.written)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first.dtype


@cache
def by_dtype(name: str) -> dict[torch.dtype, Contract]:
    """A contract once for each dtype of its results, with the cases that have them."""
    contract = contracts()[name]
    cases: dict[torch.dtype, list[Case]] = {}
    for case in contract.cases():
        cases.setdefault(result_dtype(contract, case), []).append(case)
    return {dtype: replace(contract, cases=partial(iter, some)) for dtype, some in cases.items()}


@cache
def all_reports(op: str, seed: int) -> dict[torch.dtype, dict[str, KernelReport]]:
    """How an operator's kernels do that are checked with this seed, by the dtype of the results and by provider."""
    checked = [kernel for kernel in all_kernels() if kernel.op == op and seed in seeds_of(kernel)]
    return {
        dtype: {report.provider: report for report in check_kernels(only, checked, seed=seed)}
        for dtype, only in by_dtype(op).items()
    }


def reports(kernel: Kernel, seed: int) -> dict[torch.dtype, KernelReport]:
    """How a kernel does, by the dtype of the results."""
    return {dtype: found[kernel.provider] for dtype, found in all_reports(kernel.op, seed).items()}


def seeds_of(kernel: Kernel) -> tuple[int, ...]:
    """All for what a model runs here. The sets below the best, compiled from the same sources, have one each, in turn,
    and so has the kernel "native", which is the best set's under another name. References of what several operators
    compute call theirs: they have one."""
    if kernel.provider == "reference" and contracts()[kernel.op].parts:
        return SEEDS[:1]
    below = {f"native_{name}": at for at, name in enumerate(usable_instruction_sets()) if at} | {"native": 0}
    return (SEEDS[below[kernel.provider] % len(SEEDS)],) if kernel.provider in below else SEEDS


@cache
def all_kernels() -> list[Kernel]:
    """What the registry offers for this processor; of the native ones those whose instruction set it has."""
    usable = {f"native_{name}" for name in usable_instruction_sets()} | (
        {"native"} if usable_instruction_sets()[:-1] else set()
    )
    return [
        kernel
        for op in contracts()
        for kernel in kernels(op)
        if runs_on(kernel, HERE) and (not kernel.provider.startswith("native") or kernel.provider in usable)
    ]


@pytest.mark.parametrize("kernel", all_kernels(), ids=lambda kernel: f"{kernel.op}-{kernel.provider}")
def test_kernel_meets_its_contract(kernel: Kernel) -> None:
    for seed in seeds_of(kernel):
        found = [report for report in reports(kernel, seed).values() if report.num_cases]
        for report in found:
            print(
                f"seed {seed}: {report.num_cases} cases, worst {report.worst_share:.2f} in {report.worst_case}"
            )
            assert report.passed, report.failures
        assert found, "no case ran"


@pytest.mark.parametrize("contract", contracts().values(), ids=lambda contract: contract.name)
def test_tolerances_reject_every_mutant(contract: Contract) -> None:
    # With the last of them a token once had the slot into which a mutant wrote padding, and hid it.
    for seed in SEEDS[:2] if contract.parts else (*SEEDS, 1040453025):
        print(f"seed {seed}")
        assert check_mutants(contract, seed) == []


@pytest.mark.parametrize("contract", contracts().values(), ids=lambda contract: contract.name)
def test_tolerances_have_no_slack(contract: Contract) -> None:
    """The worst kernel uses a part of what is accepted in every dtype, or is exact: no tolerance that cannot fail."""
    offered = [kernel for kernel in all_kernels() if kernel.op == contract.name]
    for dtype in by_dtype(contract.name):
        found = [reports(kernel, seeds_of(kernel)[0])[dtype] for kernel in offered]
        assert any(report.num_cases for report in found), f"no case has a result in {dtype}"
        worst = max(report.worst_share for report in found)
        assert worst > 0.03 or contract.tolerance[dtype] == Tolerance(0, 0), f"{dtype}: {worst:.3f}"


def test_every_contract_describes_itself() -> None:
    for name, contract in contracts().items():
        assert name == contract.name and contract.summary and contract.rounding, name
        assert contract.returns or any(argument.written for argument in contract.arguments), name
        assert contract.mutants, name
        assert kernels(name)[0].provider == "reference" and kernels(name)[0].verified_on, name
