"""What a gate says, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lockstep.ci.gates.verdict import Verdict

_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow"}


def print_verdict(verdict: Verdict) -> None:
    """One line: which gate, what it says and why."""
    outcome = click.style(verdict.outcome, fg=_COLOURS[verdict.outcome], bold=True)
    click.echo(f"{verdict.gate}: {outcome}: {verdict.reason}")
