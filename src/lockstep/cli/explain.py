"""`lockstep explain`: who decided each option, and where the memory goes."""

from __future__ import annotations

from dataclasses import asdict

import click

from lockstep.cli.opening import open_llm
from lockstep.cli.options import SectionedCommand, engine_options, section, server_options
from lockstep.cli.table import print_json, print_table
from lockstep.config import Decision, Given
from lockstep.config.components import OPTIONS
from lockstep.config.memory import human_bytes

_json_option = section("Output")("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("explain", short_help="Say who decided each option, and where memory goes.")
def command() -> None:
    """Say what Lockstep would do with MODEL and these options, and why."""


@command.command("config", cls=SectionedCommand, short_help="Who decided each option, and why.")
@_json_option
@server_options
def explain_config(as_json: bool, options: dict[str, Given]) -> None:
    """Print every option with its value, who decided it and why. Reads the model's header, not its weights."""
    from lockstep.engine.opening import resolve_options

    decisions = resolve_options(options).decisions
    if as_json:
        print_json([asdict(decision) for decision in decisions])
    else:
        print_table(("option", "value", "decided by", "why"), [_row(decision) for decision in decisions])


@command.command("memory", cls=SectionedCommand, short_help="Where the memory goes.")
@_json_option
@engine_options()
def explain_memory(as_json: bool, options: dict[str, Given]) -> None:
    """Load MODEL, run its largest steps and print how many bytes each part of the engine takes of its device."""
    with open_llm(options) as llm:
        lines = llm.memory_report(measure=True)
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    total = sum(line.bytes for line in lines if line.is_own)
    rows = [
        (line.name, human_bytes(line.bytes), f"{line.bytes / total:.0%}" if line.is_own else "", line.note)
        for line in lines
    ]
    print_table(
        ("part", "size", "share", "note"),
        [*rows, ("total", human_bytes(total), "", "what this engine takes at most")],
        right=("size", "share"),
    )


def _row(decision: Decision) -> tuple[str, str, str, str]:
    option = OPTIONS[decision.name]
    label = option.metavar if option.positional else option.flag
    return label, _shown(decision.value), decision.source, decision.why


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)
