"""`lockstep bench`: what is measured is chosen here; how, in the bench room."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from lockstep.cli.options import Command, SectionedCommand, engine_options, section
from lockstep.config import Given
from lockstep.config.components import ENGINE_OPTIONS

_COUNT = click.IntRange(min=1)
_option = section("Workload and output")


def _seed_of(what: str) -> Callable[[Command], Command]:
    return _option("--seed", type=int, default=0, metavar="N", help=f"Seed of {what}.  [0]")


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


TUNED_BY = ("model", "revision", "tp", "ep", "device", "cache_dir")
"""Options of the engine that decide what is tuned, and where the outcome goes."""


def _shared(
    *declared: Callable[[Command], Command], engine: Collection[str] = ENGINE_OPTIONS
) -> Callable[[Command], Command]:
    """The measure's own options, then where its result goes, then the engine's, or those of them that count."""
    omitted = [name for name in ENGINE_OPTIONS if name == "seed" or name not in engine]
    decorators = [*declared, _json_out, engine_options(omit=omitted)]
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
    _seed_of("the prompts"),
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
    _seed_of("the prompts"),
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
        help="Requests per second, at random times, however many are under way. Omitted: a new one for each "
        "that ends.",
    ),
    *_shape(implied=True),
    _workload,
    _seed_of("the prompts"),
)
def serve(options: dict[str, Given], **workload: Any) -> int:
    """Send requests to a server and print the times to first token, between tokens and to the end."""
    from lockstep.bench.serve import main

    return main(options, **workload)


@command.command("host", cls=SectionedCommand, short_help="What a step costs the host, without a device.")
@_option(
    "--requests",
    "num_requests",
    type=_COUNT,
    multiple=True,
    default=(1, 64, 256),
    metavar="N",
    help="Requests that decode at once. May be repeated.  [1, 64, 256]",
)
@_count("--input-tokens", 1000, "Tokens of each prompt.")
@_count("--steps", 300, "Timed steps.")
@_json_out
def host(num_requests: tuple[int, ...], input_tokens: int, steps: int, json_out: Path | None) -> int:
    """Plan, submit and take steps of a model that computes nothing, and print what each part of a step takes."""
    from lockstep.bench.host import main

    return main(num_requests=num_requests, prompt_tokens=input_tokens, num_steps=steps, json_out=json_out)


@command.command("startup", cls=SectionedCommand, short_help="Time from process start to the first token.")
@_shared(_count("--repeats", 3, "Processes to start, one after the other."))
def startup(options: dict[str, Given], **workload: Any) -> int:
    """Start `lockstep run` in fresh processes and print the time until the first token."""
    from lockstep.bench.startup import main

    return main(options, **workload)


@command.command(
    "tune-moe", cls=SectionedCommand, short_help="The fastest tiles for MODEL's experts on this card."
)
@_shared(
    _option(
        "--tokens",
        metavar="N,N...",
        help="Tokens of a step to tune for; more than the largest take the defaults.  [1 to 2048, doubled]",
    ),
    _seed_of("inputs and weights"),
    engine=TUNED_BY,
)
def tune_moe(options: dict[str, Given], tokens: str | None, **workload: Any) -> int:
    """Time every way to compute the experts of MODEL, each checked first, and keep the best for later runs.

    Only the config.json of MODEL is read. Give --tp and --ep as the model will run.
    """
    from lockstep.bench.tune_moe import TOKENS, main

    return main(options, tokens=TOKENS if tokens is None else _counts(tokens), **workload)


def _counts(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.UsageError(f"--tokens takes positive integers with commas between them, not {text!r}")
    return tuple(map(int, words))
