"""`lockstep baseline`: this machine's speed on record, and later speeds against it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lockstep.cli.answer import note
from lockstep.cli.opening import loading_bar
from lockstep.cli.options import Command, SectionedCommand, engine_options, section
from lockstep.cli.table import print_json, print_table
from lockstep.cli.verdict import print_verdict
from lockstep.config import Given

if TYPE_CHECKING:
    from lockstep.ci.gates.baseline import Measurement, StageVerdict

DEFAULT_SCENARIO = "text"
DEFAULT_RUNS = 7

_measure = section("Measure")
_output = section("Output")


@click.group("baseline", short_help="Record this machine's speed; check later speeds against it.")
def command() -> None:
    """Keep this machine's times in FILE and compare with them. docs/gates.md says where the limits come from."""


def _shared(*declared: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """FILE, the command's own options, where the result goes, then MODEL and the engine's options."""
    decorators: list[Callable[[Command], Command]] = [
        click.argument("file", type=click.Path(dir_okay=False, path_type=Path)),
        *declared,
        _output("--json", "as_json", is_flag=True, help="Print JSON."),
        engine_options(),
    ]
    return lambda function: functools.reduce(lambda inner, add: add(inner), reversed(decorators), function)


def _runs(default: int | None, help: str) -> Callable[[Command], Command]:
    return _measure("--runs", type=click.IntRange(min=3), default=default, metavar="N", help=help)


@command.command("record", cls=SectionedCommand, short_help="Time MODEL and write FILE.")
@_shared(
    _measure(
        "--scenario", default=DEFAULT_SCENARIO, metavar="NAME", help=f"What is timed.  [{DEFAULT_SCENARIO}]"
    ),
    _runs(DEFAULT_RUNS, f"Runs whose spread decides the limits.  [{DEFAULT_RUNS}]"),
)
def record(file: Path, scenario: str, runs: int, as_json: bool, options: dict[str, Given]) -> int:
    """Time MODEL in several runs and write FILE.

    Writes nothing and exits 1 when the runs differ so much that a check could miss a slow-down of 15%.
    """
    from lockstep.bench.fingerprint import fingerprint
    from lockstep.ci.gates.baseline import TooWide, require_usable, write_baseline
    from lockstep.ci.gates.files import require_writable
    from lockstep.ci.gates.scenarios import scenario_named

    stages = scenario_named(scenario).stages
    require_writable(file)
    measured = _timed(scenario, options, fingerprint(), runs)
    try:
        require_usable(measured, stages, runs)
        refused = None
    except TooWide as error:
        refused = error
    if as_json:
        print_json({"written": refused is None, "measurement": msgspec.to_builtins(measured)})
    else:
        _print_recorded(measured)
    if refused is not None:
        click.echo(f"{click.style('not recorded:', fg='red', bold=True)} {refused}", err=True)
        return 1
    write_baseline(measured, file)
    return 0


@command.command("check", cls=SectionedCommand, short_help="Time MODEL and compare with FILE.")
@_shared(
    _measure("--scenario", metavar="NAME", help="What is timed.  [that of FILE]"),
    _runs(None, "Runs whose median is compared.  [as many as FILE has]"),
    _output("--explain", is_flag=True, help="Print every stage, old against new, with its limit."),
)
def check(
    file: Path, scenario: str | None, runs: int | None, explain: bool, as_json: bool, options: dict[str, Given]
) -> int:
    """Time MODEL again and compare with FILE; exits 1 when a stage is slower than its limit, or missing.

    Times of another machine, model, scenario or set of options are no measure of this one: such a FILE is refused.
    """
    from lockstep.bench.fingerprint import fingerprint
    from lockstep.ci.gates.baseline import judge, read_baseline, require_same_machine, require_usable
    from lockstep.ci.gates.scenarios import scenario_named

    baseline = read_baseline(file)
    if scenario not in (None, baseline.scenario):
        raise click.UsageError(f"{file} holds the scenario {baseline.scenario}, not {scenario}")
    num_runs = runs or baseline.num_runs
    machine = fingerprint()
    require_same_machine(baseline, machine)
    require_usable(baseline, scenario_named(baseline.scenario).stages, num_runs)
    new = _timed(baseline.scenario, options, machine, num_runs, baseline)
    stages = judge(baseline, new)
    verdicts = [stage.verdict for stage in stages]
    passed = all(verdict.passed for verdict in verdicts)
    if as_json:
        print_json(
            {
                "passed": passed,
                "verdicts": [verdict.as_json() for verdict in verdicts],
                "stages": msgspec.to_builtins(stages),
                "measurement": msgspec.to_builtins(new),
            }
        )
        return 0 if passed else 1
    if explain:
        _print_compared(baseline, new, stages)
    for verdict in verdicts:
        print_verdict(verdict)
    return 0 if passed else 1


def _timed(
    name: str,
    options: Mapping[str, Given],
    machine: dict[str, Any],
    num_runs: int,
    baseline: Measurement | None = None,
) -> Measurement:
    from lockstep.bench.fingerprint import was_busy
    from lockstep.ci.gates.baseline import measure
    from lockstep.ci.gates.scenarios import scenario_named

    if was_busy(machine):
        note(f"this machine is not quiet (load {machine['load_average']:.2f}): times will vary more")
    with loading_bar() as progress:
        return measure(
            name,
            scenario_named(name),
            options,
            machine=machine,
            num_runs=num_runs,
            progress=progress and (lambda done, total: progress("Runs", done, total)),
            baseline=baseline,
        )


def _print_recorded(measured: Measurement) -> None:
    print_table(
        ("stage", "median, s", "deviation", "limit", "surely caught"),
        [
            (
                stage,
                f"{spread.median_s:.4g}",
                f"{spread.deviation:.1%}",
                f"{spread.limit(spread.num_runs) - 1:+.1%}",
                f"{spread.catches(spread.num_runs) - 1:+.1%}",
            )
            for stage, spread in measured.spreads.items()
        ],
        right=("median, s", "deviation", "limit", "surely caught"),
    )


def _print_compared(baseline: Measurement, new: Measurement, stages: Sequence[StageVerdict]) -> None:
    def shown(measurement: Measurement, stage: str) -> str:
        times_s = measurement.times_s.get(stage)
        if not times_s:
            return "missing"
        return f"{statistics.median(times_s):.4g} ({min(times_s):.4g} - {max(times_s):.4g})"

    print_table(
        ("stage", "old, s (min - max)", "new, s (min - max)", "change", "limit", "verdict"),
        [
            (
                found.stage,
                shown(baseline, found.stage),
                shown(new, found.stage),
                "" if found.ratio is None else f"{found.ratio - 1:+.1%}",
                "" if found.limit is None else f"{found.limit - 1:+.1%}",
                found.outcome,
            )
            for found in stages
        ],
        right=("change", "limit"),
    )
