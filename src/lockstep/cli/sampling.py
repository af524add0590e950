"""Options that say how an answer is sampled, shared by `run` and `chat`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lockstep.cli.options import Command, section
from lockstep.core.errors import InvalidRequest
from lockstep.core.output import RequestOutput
from lockstep.core.sampling import Grammar, GrammarKind, SamplingParams

_GRAMMARS: dict[str, GrammarKind] = {"json_schema": "json_schema", "regex": "regex", "ebnf": "ebnf"}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def sampling_options(*, temperature: float, max_tokens: int) -> Callable[[Command], Command]:
    """Adds the sampling options; the command receives `params`. The arguments are the command's defaults.

    `params.max_tokens` is None where the user named no length: `started` knows what to do then.
    """
    option = section("Sampling")
    declared = [
        option(
            "--max-tokens",
            type=int,
            default=None,
            metavar="N",
            help=f"Most tokens to generate.  [{max_tokens}, or what fits]",
        ),
        option(
            "--temperature",
            type=float,
            default=temperature,
            metavar="X",
            help=f"0 always takes the likeliest token; 1 is the model's own spread.  [{temperature:g}]",
        ),
        option(
            "--top-p",
            type=float,
            default=1.0,
            metavar="X",
            help="Keep the likeliest tokens up to this mass.  [1: all]",
        ),
        option("--top-k", type=int, default=0, metavar="N", help="Keep the N likeliest tokens.  [0: all]"),
        option(
            "--min-p",
            type=float,
            default=0.0,
            metavar="X",
            help="Drop tokens less likely than X times the likeliest.  [0: none]",
        ),
        option(
            "--seed",
            type=int,
            default=None,
            metavar="N",
            help="The same seed draws the same answer. Omitted: what every start of the command draws from.",
        ),
        option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT. May be repeated."),
        option("--json-schema", type=_FILE, metavar="FILE", help="Answer with JSON valid under this schema."),
        option("--regex", metavar="PATTERN", help="Answer with text that matches this regular expression."),
        option(
            "--ebnf", type=_FILE, metavar="FILE", help="Answer in the language of this grammar (GBNF or Lark)."
        ),
    ]

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def collect(**values: Any) -> Any:
            grammar = _grammar({kind: values.pop(kind) for kind in _GRAMMARS})
            sampling = {name: values.pop(name) for name in _PLAIN}
            try:
                params = SamplingParams(grammar=grammar, **sampling)
            except InvalidRequest as error:
                raise _as_written(error) from None
            return function(params=params, **values)

        command: Command = collect
        for add in reversed(declared):
            command = add(command)
        return command

    return decorate


def started(
    start: Callable[[SamplingParams], Iterable[RequestOutput]], params: SamplingParams, *, max_tokens: int
) -> Iterable[RequestOutput]:
    """The outputs of `start`, with at most `max_tokens` or what fits where `params` names no length.

    A length that the user named must fit. Raises InvalidRequest.
    """
    if params.max_tokens is not None:
        return start(params)
    try:
        return start(replace(params, max_tokens=max_tokens))
    except InvalidRequest as error:
        if error.param != "max_tokens":
            raise
        return start(params)


_PLAIN = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def _as_written(error: InvalidRequest) -> InvalidRequest:
    """The same about the flag that the user wrote."""
    if error.param is None:
        return error
    said = str(error).replace(error.param, "--" + error.param.replace("_", "-"), 1)
    return InvalidRequest(said, param=error.param, code=error.code)


def _grammar(written: dict[str, str | Path | None]) -> Grammar | None:
    given = {name: value for name, value in written.items() if value is not None}
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(f"{flags} exclude each other: an answer follows one grammar")
    for name, value in given.items():
        return Grammar(_GRAMMARS[name], _text_of(value, name) if isinstance(value, Path) else value)
    return None


def _text_of(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--{name.replace('_', '-')} {path} cannot be read: {error}") from None


def require_text(text: str) -> None:
    """Raises UsageError for what was typed or read as bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise click.UsageError("the prompt is not valid UTF-8") from None
