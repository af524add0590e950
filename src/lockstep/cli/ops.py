"""`lockstep ops`: the operators, their kernels, and which kernel serves what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lockstep.cli.opening import open_llm
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.table import print_json, print_table
from lockstep.config import Given

if TYPE_CHECKING:
    from lockstep.ops.contract import Kernel
    from lockstep.ops.selection import Binding

_json_option = section("Output")("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("ops", short_help="List operators and kernels; say which serves what, and why.")
def command() -> None:
    """The operator registry: what each operator means, and what can compute it."""


@command.command("list", cls=SectionedCommand, short_help="Every operator with its kernels.")
@_json_option
def list_ops(as_json: bool) -> None:
    """Print every operator, what it computes, and its kernels with what each of them needs."""
    from lockstep.ops.registry import contracts, kernels

    found = {name: (contract.summary, kernels(name)) for name, contract in sorted(contracts().items())}
    if as_json:
        print_json([_operator(name, summary, offered) for name, (summary, offered) in found.items()])
    else:
        rows = [(name, summary, "\n".join(map(_needs, offered))) for name, (summary, offered) in found.items()]
        print_table(("operator", "computes", "kernels"), rows)


@command.command("explain", cls=SectionedCommand, short_help="Which kernel serves each call of MODEL, and why.")
@_json_option
@engine_options()
def explain_ops(as_json: bool, options: dict[str, Given]) -> None:
    """Build MODEL and print, for each operator, the kernel that was bound, why, and which ones refused."""
    with open_llm(options) as llm:
        groups = _grouped(llm.kernel_report())
    if as_json:
        print_json([group.as_json() for group in groups])
    else:
        rows = [(group.op, group.kernel, group.places, group.why, group.refusals) for group in groups]
        print_table(("operator", "kernel", "where", "why", "refused"), rows)


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
        return "\n".join(f"{kernel}: {reason}" for kernel, reason in self.refused)

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


def _needs(kernel: Kernel) -> str:
    needs = [*sorted(kernel.platforms), *sorted(kernel.features)]
    return kernel.provider + (f" ({', '.join(needs)})" if needs else "")


def _operator(name: str, summary: str, offered: Sequence[Kernel]) -> dict[str, Any]:
    described = [
        {"name": kernel.provider, "platforms": sorted(kernel.platforms), "features": sorted(kernel.features)}
        for kernel in offered
    ]
    return {"op": name, "summary": summary, "kernels": described}
