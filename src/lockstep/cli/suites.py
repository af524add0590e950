"""`lockstep suites`: which tests run on which machines, in which parts, and what came of them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lockstep.cli.affected import command as affected
from lockstep.cli.options import SectionedCommand, section
from lockstep.cli.table import print_json, print_table

if TYPE_CHECKING:
    from lockstep.ci.listing import Listed
    from lockstep.ci.parts import Job
    from lockstep.ci.plan import Part
    from lockstep.ci.registry import Registry
    from lockstep.ci.results import Attempt, RunReport

FAILED, NOTHING_SELECTED = 1, 5
STAGES = PER_COMMIT, NIGHTLY, EVERY_STAGE = ("per-commit", "nightly", "all")
_NO_TEST = "has no test in stage {stage}: give it one, or take it out of pyproject.toml"
LONGEST_SHOWN = 3
SUMMARY_LINES = 25
"""Of one failure, on the terminal; the reports have it whole."""

_choice = section("Choice")
_parts = section("Parts")
_how = section("Running")
_output = section("Output")

_root = _choice(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="A folder of the project; the present one when omitted.",
)
_suites = _choice(
    "--suite", "suites", multiple=True, metavar="S", help="A suite; may be repeated; all when omitted."
)
_stage = _choice(
    "--stage", type=click.Choice(STAGES), default=STAGES[0], help="Which tests of a suite.  [per-commit]"
)
_json = _output("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("suites", short_help="List, plan and run suites of tests; say what a change touches.")
def command() -> None:
    """Suites of tests: which tests run on which machines, in which parts, and what came of them."""


command.add_command(affected)


@command.command("list", cls=SectionedCommand, short_help="Every test file with the suites that it states.")
@_root
@_json
def list_suites(root: Path, as_json: bool) -> int:
    """Print the suites and, for each test file, what its marks state; disabled tests with reason and age.

    Exits 1 when a test belongs to no suite, a mark is wrong, or a suite has nothing to run per commit.
    """
    from lockstep.ci.listing import listed, suite_sizes, suites_without

    registry = _registry(root)
    rows, sizes, today = listed(registry), suite_sizes(registry), date.today()
    disabled = [row.disabled_json(today) for row in rows if row.mark.disabled is not None]
    idle = suites_without(PER_COMMIT, sizes)
    problems = [*registry.problems, *(f"suite {name} {_NO_TEST.format(stage=PER_COMMIT)}" for name in idle)]
    if as_json:
        files = [row.as_json() for row in rows]
        print_json({"suites": sizes, "files": files, "disabled": disabled, "problems": problems})
    else:
        _print_list(rows, sizes, disabled)
        if quiet := suites_without(NIGHTLY, sizes):
            click.echo(f"nothing more at night: {', '.join(quiet)}")
        for problem in problems:
            click.echo(f"problem: {problem}", err=True)
    return FAILED if problems else 0


@command.command("plan", cls=SectionedCommand, short_help="The parts of suites and their times.")
@_root
@_suites
@_stage
@_parts("--total-partitions", type=int, metavar="N", help="How many parts each suite has.")
@_parts(
    "--seconds-per-part",
    type=float,
    default=600.0,
    metavar="S",
    help="Without --total-partitions: as many parts as keep each within S.  [600]",
)
@_json
def plan_suites(
    root: Path,
    suites: tuple[str, ...],
    stage: str,
    total_partitions: int | None,
    seconds_per_part: float,
    as_json: bool,
) -> int:
    """Share each suite's files out over parts, longest first, and print what each part holds and takes.

    Times are measured ones where a run recorded them, else the estimates of the marks. Exits 5 when a suite has no
    test per commit, or when one that was asked for has none in this stage.
    """
    from lockstep.ci.listing import suite_sizes
    from lockstep.ci.plan import plan_suite

    registry = _registry(root)
    plans = [
        plan_suite(registry, name, stage, num_parts=total_partitions, seconds_per_part=seconds_per_part)
        for name in suites or registry.project.suites
    ]
    if as_json:
        print_json([each.as_json() for each in plans])
    else:
        rows = [
            (each.suite, f"{number} of {len(each.parts)}", f"{seconds:.0f}", str(len(part)), _longest(part))
            for each in plans
            for number, (part, seconds) in enumerate(zip(each.parts, each.seconds, strict=True))
        ]
        print_table(("suite", "part", "seconds", "files", "longest files"), rows, right=("seconds", "files"))
        _print_unmeasured(suite_sizes(registry), [each.suite for each in plans], stage)
    empty = [each.suite for each in plans if not each.parts]
    for suite in empty:
        click.echo(f"suite {suite} {_NO_TEST.format(stage=stage)}", err=True)
    may_be_empty = stage == NIGHTLY and not suites and len(empty) < len(plans)
    return NOTHING_SELECTED if empty and not may_be_empty else 0


@command.command("run", cls=SectionedCommand, short_help="Run suites and report.")
@_root
@_choice("--suite", "suites", multiple=True, required=True, metavar="S", help="A suite; may be repeated.")
@_stage
@_choice("-k", "keyword", metavar="FILTER", help="Only tests that pytest's -k takes.")
@_parts(
    "--partition-id",
    type=int,
    metavar="I",
    help="Run part I of each suite, counted from 0. Omitted: all of it.",
)
@_parts("--total-partitions", type=int, metavar="N", help="Of N parts.")
@_how("--continue-on-error", is_flag=True, help="Go on after a failed test.")
@_how("--jobs", type=click.IntRange(1), metavar="N", help="Processes side by side.  [2, on one core 1]")
@_how(
    "--timeout-per-test",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds for one test.  [the project's]",
)
@_how(
    "--flaky-budget",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Tests that may fail and then pass when run again; above 0 it goes on after a failed test.  [0]",
)
@_output(
    "--report-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/suites"),
    metavar="DIR",
    help="Where report.json, junit.xml, summary.md and logs/ go.  [build/suites]",
)
@_output("--update-durations", is_flag=True, help="Record how long files took, for later plans.")
@_json
def run_suites(
    root: Path,
    suites: tuple[str, ...],
    stage: str,
    keyword: str | None,
    partition_id: int | None,
    total_partitions: int | None,
    continue_on_error: bool,
    jobs: int | None,
    timeout_per_test: float | None,
    flaky_budget: int,
    report_dir: Path,
    update_durations: bool,
    as_json: bool,
) -> int:
    """Run the tests of suites and write JSON, JUnit XML and Markdown.

    A failure of the machine (device lost, port in use, memory while loading, network), told by the exception's type,
    is tried again at most twice. Any other failed test runs once more, only to say whether it is flaky.

    Exits 1 when a test failed, was lost or too many were flaky, 5 when a suite ran no test. A run that is interrupted
    or terminated writes its reports and exits 130.
    """
    from lockstep.ci.reports import as_json as report_json
    from lockstep.ci.run import RunOptions, run

    options = RunOptions(
        suites=suites,
        stage=stage,
        part=_part(partition_id, total_partitions),
        keyword=keyword,
        continue_on_error=continue_on_error,
        num_lanes=jobs or min(2, os.cpu_count() or 1),
        timeout_per_test_s=timeout_per_test,
        flaky_budget=flaky_budget,
        report_dir=report_dir,
        update_durations=update_durations,
    )
    # Whoever ends this process means the test processes too: an interrupt ends them, and the reports are written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(_registry(root), options, _say_nothing if as_json else _print_file)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(report_json(report))
    else:
        _print_report(report, report_dir)
    return report.exit_code


def _registry(root: Path) -> Registry:
    from lockstep.ci.project import open_project
    from lockstep.ci.registry import load_registry

    return load_registry(open_project(root))


def _print_unmeasured(sizes: Sequence[dict[str, Any]], suites: Sequence[str], stage: str) -> None:
    for size in sizes:
        stages = [found for name, found in size["stages"].items() if stage in (name, EVERY_STAGE)]
        unmeasured, files = (sum(found[what] for found in stages) for what in ("unmeasured", "files"))
        if size["suite"] in suites and unmeasured:
            click.echo(
                f"{size['suite']}: {unmeasured} of {files} times are estimates; run --update-durations measures them"
            )


def _longest(part: Sequence[Job]) -> str:
    names = [f"{job.target} ({job.seconds:.0f} s)" for job in part[:LONGEST_SHOWN]]
    return "\n".join([*names, "..."] if len(part) > LONGEST_SHOWN else names)


def _part(number: int | None, total: int | None) -> Part | None:
    from lockstep.ci.plan import Part

    if (number is None) != (total is None):
        raise click.UsageError("--partition-id and --total-partitions go together")
    return None if number is None or total is None else Part(number, total)


def _print_list(
    rows: Sequence[Listed], sizes: Sequence[dict[str, Any]], disabled: Sequence[dict[str, Any]]
) -> None:
    cells = []
    for row in rows:
        mark = row.mark
        name = f"{row.path}::{row.scope}" if row.scope else row.path
        words = [mark.stage, *(f"needs {need}" for need in mark.needs)]
        words += ["exclusive"] * mark.exclusive + ["disabled"] * (mark.disabled is not None)
        cells.append((name, ", ".join(mark.suites), ", ".join(words), str(row.num_tests)))
    print_table(("tests", "suites", "how", "number"), cells, right=("number",))
    per_stage = [
        (
            each["suite"],
            stage,
            each["platform"],
            str(each["devices"]),
            str(size["files"]),
            f"{size['seconds']:.0f}",
        )
        for each in sizes
        for stage, size in each["stages"].items()
    ]
    numbers = ("devices", "files", "seconds")
    print_table(("suite", "stage", "platform", *numbers), per_stage, right=numbers)
    for each in disabled:
        name = f"{each['path']}::{each['scope']}" if each["scope"] else each["path"]
        click.echo(f"disabled for {each['age_days']} days: {name}: {each['reason']} ({each['issue']})")


def _say_nothing(suite: str, path: str, attempts: Sequence[Attempt]) -> None:
    """JSON is all that is wanted."""


def _print_file(suite: str, path: str, attempts: Sequence[Attempt]) -> None:
    counts = Counter(attempt.outcome for attempt in attempts)
    words = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    seconds = sum(attempt.seconds for attempt in attempts)
    click.secho(f"{seconds:7.1f} s  {suite:8} {path}: {words}", fg="red" if counts["failed"] else None)


def _print_report(report: RunReport, folder: Path) -> None:
    from lockstep.ci.results import STATUSES

    for result in report.results:
        for number, attempt in enumerate(result.attempts, 1):
            if attempt.outcome == "failed":
                whose = f" ({attempt.infrastructure})" if attempt.infrastructure else ""
                click.secho(f"\n{result.test} [{result.suite}], attempt {number}{whose}", fg="red", bold=True)
                click.echo("\n".join(attempt.text.splitlines()[-SUMMARY_LINES:]))
    rows = [
        (
            suite.name,
            *(str(suite.counts[status]) for status in STATUSES),
            str(len(suite.not_run)),
            suite.verdict + (f": {suite.missing}" if suite.missing else ""),
        )
        for suite in report.suites
    ]
    print_table(("suite", *STATUSES, "not run", "verdict"), rows, right=(*STATUSES, "not run"))
    for suite in report.suites:
        for reason, number in Counter(reason for _, reason in suite.not_run).items():
            click.echo(f"{suite.name}: {number} not run: {reason}")
    if report.stopped:
        click.echo("stopped after the first failure; --continue-on-error runs the others too")
    if report.num_flaky:
        click.echo(f"{report.num_flaky} flaky, {report.flaky_budget} allowed")
    click.echo(f"{report.wall_s:.0f} s; reports in {folder}")
