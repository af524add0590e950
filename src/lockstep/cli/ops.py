"""`lockstep ops`: the operators and their kernels; which kernel serves what, which are right, and how fast."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lockstep.cli.answer import note
from lockstep.cli.machine import native_kernels
from lockstep.cli.opening import loading_bar
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.table import print_json, print_table
from lockstep.config import Given

if TYPE_CHECKING:
    from lockstep.ops.check import KernelReport
    from lockstep.ops.contract import Kernel
    from lockstep.ops.selection import Binding
    from lockstep.ops.suite import OperatorReport

FAILURES_SHOWN = 5
"""Failing cases of one kernel that the table for people lists."""

_json_option = section("Output")("--json", "as_json", is_flag=True, help="Print JSON.")
_choice = section("Choice")
_platform = _choice(
    "--platform", default="auto", metavar="P", help="Device family to run on; the best one here when omitted."
)
_seed = _choice("--seed", type=int, metavar="N", help="Seed of the inputs; a fresh one when omitted.")


@click.group("ops", short_help="List, explain, check and time operators and their kernels.")
def command() -> None:
    """The operator registry: what each operator means, and what can compute it."""


@command.command("list", cls=SectionedCommand, short_help="Every operator with its kernels.")
@_json_option
def list_ops(as_json: bool) -> None:
    """Print every operator, what it computes, and its kernels: what each needs and where it was verified."""
    from lockstep.ops.page import kernel_cells
    from lockstep.ops.registry import contracts, kernels

    found = {name: (contract.summary, kernels(name)) for name, contract in sorted(contracts().items())}
    if as_json:
        print_json([_operator(name, summary, offered) for name, (summary, offered) in found.items()])
        return
    rows: list[tuple[str, ...]] = []
    for name, (summary, offered) in found.items():
        for number, kernel in enumerate(offered):
            rows.append((*((name, summary) if number == 0 else ("", "")), *kernel_cells(kernel)))
    print_table(("operator", "computes", "kernel", "platforms", "needs", "verified on"), rows)
    click.echo(native_kernels())


@command.command("explain", cls=SectionedCommand, short_help="Which kernel serves each call of MODEL, and why.")
@_json_option
@_choice("--model", "named_model", metavar="M", help="MODEL, as an option.")
@_choice("--platform", "named_platform", metavar="P", help="Another word for --device.")
@engine_options()
def explain_ops(
    as_json: bool, named_model: str | None, named_platform: str | None, options: dict[str, Given]
) -> None:
    """Print, for each operator of MODEL, the kernel that it binds, why, and why each other one is not bound.

    Reads the model's header, not its weights.
    """
    from lockstep.engine.bindings import explain_bindings
    from lockstep.platforms.registry import pick_platform

    _add(options, "model", named_model, "MODEL and --model both name a model")
    _add(options, "device", named_platform, "--device and --platform both name a device")
    if named_platform is not None:
        pick_platform(named_platform, "--platform")
    if "model" in options:
        _refuse_operator(options["model"].value)
    groups = _grouped(explain_bindings(options))
    if as_json:
        print_json([group.as_json() for group in groups])
    else:
        rows = [(group.op, group.kernel, group.places, group.why, group.refusals) for group in groups]
        print_table(("operator", "kernel", "where", "why", "not bound"), rows)


@command.command("check", cls=SectionedCommand, short_help="Every kernel against its operator's contract.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_platform
@_choice("--op", "ops", metavar="NAME", multiple=True, help="One more operator; may be repeated.")
@_choice("--kernel", metavar="K", help="Kernels of one provider; all of them when omitted.")
@_seed
@_choice(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Operators at a time, each in a process of its own.  [1]",
)
@_json_option
def check_ops(
    names: tuple[str, ...],
    platform: str,
    ops: tuple[str, ...],
    kernel: str | None,
    seed: int | None,
    jobs: int,
    as_json: bool,
) -> int:
    """Run every case of every kernel of the operators NAME that can run here, with fresh inputs and with poison in
    unwritten memory. Without names, of all operators.

    An error of 1 is all that the contract accepts. Where nobody watches a bar, each operator ends with a line on
    stderr. Exits 1 when a kernel fails, when a known-wrong version of an
    operator passes, and when nothing was there to check.
    """
    from lockstep.ops.suite import check_all, passed, select
    from lockstep.platforms.registry import pick_platform

    seed = secrets.randbelow(2**31) if seed is None else seed
    family = pick_platform(platform, "--platform")
    asked = dict.fromkeys((*names, *ops)) or (None,)
    selection = tuple(each for op in asked for each in select(family.capabilities(), op=op, provider=kernel))
    reports = []
    with loading_bar() as progress:
        for report in check_all(selection, family, seed, num_processes=jobs):
            reports.append(report)
            if progress is not None:
                progress("Checking operators", len(reports), len(selection))
            else:
                outcome = "passed" if report.passed else "failed"
                note(f"{len(reports)} of {len(selection)}: {report.op} {outcome}")
    place = {each.contract.name: number for number, each in enumerate(selection)}
    reports.sort(key=lambda report: place[report.op])
    is_right = passed(reports)
    if as_json:
        facts = {"platform": family.name, "device": family.capabilities().device_name, "seed": seed}
        print_json({**facts, "passed": is_right, "operators": [report.as_json() for report in reports]})
    else:
        _print_check(reports)
        verdict = "passed" if is_right else "failed" if any(each.kernels for each in reports) else "nothing ran"
        click.echo(f"{verdict} on {family.name} ({family.capabilities().device_name}) with --seed {seed}")
    return 0 if is_right else 1


@command.command("bench", cls=SectionedCommand, short_help="Time an operator's kernels over its sizes.")
@click.argument("name", metavar="NAME")
@_choice(
    "--providers",
    metavar="A,B...",
    help="Kernels to time, and torch_compile for the compiled reference; all of them when omitted.",
)
@_platform
@_choice("--sizes", metavar="N,N...", help="Sizes to time; the contract's when omitted.")
@_choice("--seed", type=int, default=0, metavar="N", help="Seed of the inputs.  [0]")
@section("Output")(
    "--json",
    "json_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT",
    help="Also write the result, with the machine's fingerprint, to OUT.",
)
@section("Output")(
    "--plot",
    "plot_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Also draw the result.",
)
def bench_ops(
    name: str,
    providers: str | None,
    platform: str,
    sizes: str | None,
    seed: int,
    json_out: Path | None,
    plot_out: Path | None,
) -> int:
    """Time each kernel of the operator NAME, after comparing its results with the reference's.

    Prints time, bytes and operations per second, and the share of what this machine's memory and processors were
    just measured to do. Exits 1 when a kernel is wrong and when none was timed.
    """
    asked = _words(providers)
    if asked == ():
        raise click.UsageError("--providers names none; leave it out to time all of them")
    wanted = _numbers(sizes)
    for option, path in (("--json", json_out), ("--plot", plot_out)):
        _require_place(option, path)
    from lockstep.bench.ops import main

    return main(
        name,
        providers=asked,
        platform=platform,
        sizes=wanted,
        seed=seed,
        json_out=json_out,
        plot_out=plot_out,
        on_size=lambda size: note(f"{name} at {size}"),
    )


def _require_place(option: str, path: Path | None) -> None:
    """Raises UsageError where a file cannot be written: better said before minutes of measuring than after."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"{option} {path} cannot be written: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.UsageError(f"{option} {path} cannot be written: permission denied")


@dataclass(slots=True)
class _Group:
    """Call sites of one operator that got the same kernel for the same reasons."""

    op: str
    kernel: str
    why: str
    refused: tuple[tuple[str, str], ...]
    where: list[str] = field(default_factory=list)

    @property
    def places(self) -> str:
        more = len(self.where) - 1
        return self.where[0] + (f" and {more} more" if more else "")

    @property
    def refusals(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for kernel, reason in self.refused:
            by_reason.setdefault(reason, []).append(kernel)
        return "\n".join(f"{', '.join(kernels)}: {reason}" for reason, kernels in by_reason.items())

    def as_json(self) -> dict[str, Any]:
        refused = [{"kernel": kernel, "reason": reason} for kernel, reason in self.refused]
        return {"op": self.op, "kernel": self.kernel, "why": self.why, "refused": refused, "where": self.where}


def _grouped(bindings: Sequence[Binding]) -> list[_Group]:
    """Groups in order of first appearance: a model repeats the same few call sites in every layer."""
    groups: dict[tuple[Any, ...], _Group] = {}
    for binding in bindings:
        what = (binding.op, binding.kernel.provider, binding.why, binding.refused)
        groups.setdefault(what, _Group(*what)).where.append(binding.where)
    return list(groups.values())


def _add(options: dict[str, Given], name: str, value: str | None, twice: str) -> None:
    if value is None:
        return
    if name in options:
        raise click.UsageError(f"{twice}: give one of them")
    options[name] = Given(value, "command line")


def _refuse_operator(model: str) -> None:
    """An operator's name where a model's belongs. Raises click.UsageError."""
    from lockstep.ops.registry import contracts

    if model in contracts() and not Path(model).exists():
        raise click.UsageError(f"{model} is an operator: all of those that MODEL needs are explained at once")


def _print_check(reports: Sequence[OperatorReport]) -> None:
    rows: list[tuple[str, ...]] = []
    for report in reports:
        lines = [_checked_cells(each) for each in report.kernels]
        lines += [(provider, "", "", f"not run: {reason}") for provider, reason in report.not_run]
        for number, line in enumerate(lines):
            mutants = f"{report.num_rejected} of {report.num_mutants}"
            rows.append((report.op, mutants, *line) if number == 0 else ("", "", *line))
    titles = ("operator", "mutants rejected", "kernel", "cases", "worst error", "outcome")
    print_table(titles, rows, right=("cases", "worst error"))
    for report in reports:
        for text in report.accepted_mutants:
            click.echo(f"{report.op}: not rejected: {text}")
        for kernel in report.kernels:
            for text in kernel.failures[:FAILURES_SHOWN]:
                click.echo(f"{report.op}.{kernel.provider}: {text}")
            more = len(kernel.failures) - FAILURES_SHOWN
            if more > 0:
                click.echo(f"{report.op}.{kernel.provider}: and {more} more (--json has them all)")


def _checked_cells(report: KernelReport) -> tuple[str, str, str, str]:
    refused = f", refuses {len(report.refused)} more cases" if report.refused else ""
    outcome = ("passed" if report.passed else "failed") + refused
    return report.provider, str(report.num_cases), f"{report.worst_share:.2f}", outcome


def _operator(name: str, summary: str, offered: Sequence[Kernel]) -> dict[str, Any]:
    described = [
        {
            "name": kernel.provider,
            "platforms": sorted(kernel.platforms),
            "features": sorted(kernel.features),
            "verified_on": list(kernel.verified_on),
        }
        for kernel in offered
    ]
    return {"op": name, "summary": summary, "kernels": described}


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    words = _words(text)
    if words is None:
        return None
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.UsageError(f"--sizes takes positive integers with commas between them, not {text!r}")
    return tuple(map(int, words))
