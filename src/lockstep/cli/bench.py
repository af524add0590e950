"""`lockstep bench`: what is measured is chosen here; how, in the bench room."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lockstep.cli.options import Command, SectionedCommand, engine_options, section
from lockstep.config import Given

_COUNT = click.IntRange(min=1)
_option = section("Workload and output")

_seed = _option("--seed", type=int, default=0, metavar="N", help="Seed of the prompts.  [0]")
_workload = _option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON lines with prompt or prompt_token_ids, and max_tokens, in place of random prompts.",
)
_compare = _option(
    "--compare",
    type=click.Choice(["transformers"]),
    help="Measure this too: same weights, prompts and threads, in turn, each in its own process.",
)
_json_out = _option(
    "--json",
    "json_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT",
    help="Also write the result, with the machine's fingerprint, to OUT.",
)


def _count(flag: str, default: int, help: str, *, implied: bool = False) -> Callable[[Command], Command]:
    """An option that counts. An implied default reaches the measure as None: it must know what was written."""
    given = None if implied else default
    return _option(flag, type=_COUNT, default=given, metavar="N", help=f"{help}  [{default}]")


def _shape(*, implied: bool) -> tuple[Callable[[Command], Command], ...]:
    return (
        _count("--input-tokens", 128, "Tokens of a random prompt.", implied=implied),
        _count("--output-tokens", 128, "Tokens of an answer, unless the workload says.", implied=implied),
    )


def _shared(*declared: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """The measure's own options, then where its result goes, then the engine's."""
    decorators = [*declared, _json_out, engine_options(omit=["seed"])]
    return lambda function: functools.reduce(lambda inner, add: add(inner), reversed(decorators), function)


@click.group("bench", short_help="Measure throughput, latency, serving and startup.")
def command() -> None:
    """Measure MODEL on this machine. Every result names the machine and the options."""


@command.command("throughput", cls=SectionedCommand, short_help="Tokens per second of many requests at once.")
@_shared(
    _count("--num-requests", 64, "Requests, all present from the start.", implied=True),
    *_shape(implied=True),
    _workload,
    _count("--repeats", 3, "Timed runs, after a short one that is not timed."),
    _seed,
    _compare,
)
def throughput(options: dict[str, Given], **workload: Any) -> int:
    """Answer many requests at once, in this process, and print tokens per second."""
    from lockstep.bench.throughput import main

    return main(options, **workload)


@command.command(
    "latency", cls=SectionedCommand, short_help="Time of one batch, first token and each further one."
)
@_shared(
    _count("--batch-size", 1, "Requests in the batch."),
    *_shape(implied=False),
    _count("--repeats", 5, "Timed runs, after one that is not timed."),
    _seed,
    _compare,
)
def latency(options: dict[str, Given], **workload: Any) -> int:
    """Answer one batch again and again, and print the time to the first token and of each further one."""
    from lockstep.bench.latency import main

    return main(options, **workload)


@command.command("serve", cls=SectionedCommand, short_help="Latency and throughput over HTTP.")
@_shared(
    _option("--url", metavar="URL", help="Server to load. Omitted: one is started for the measure."),
    _count("--num-requests", 64, "Requests to send.", implied=True),
    _count("--concurrency", 16, "Requests under way at once.", implied=True),
    _option(
        "--rate",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Requests per second, at random times, however many are under way.",
    ),
    *_shape(implied=True),
    _workload,
    _seed,
)
def serve(options: dict[str, Given], **workload: Any) -> int:
    """Send requests to a server and print the times to first token, between tokens and to the end."""
    from lockstep.bench.serve import main

    return main(options, **workload)


@command.command("startup", cls=SectionedCommand, short_help="Time from process start to the first token.")
@_shared(_count("--repeats", 3, "Processes to start, one after the other."))
def startup(options: dict[str, Given], **workload: Any) -> int:
    """Start `lockstep run` in fresh processes and print the time until the first token."""
    from lockstep.bench.startup import main

    return main(options, **workload)
