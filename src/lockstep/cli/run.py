"""`lockstep run`: one answer."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from lockstep.cli.answer import Answer, note
from lockstep.cli.machine import native_kernels
from lockstep.cli.opening import open_llm
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.sampling import sampling_options
from lockstep.config import Given
from lockstep.core.clock import SystemClock
from lockstep.core.sampling import SamplingParams

_option = section("Prompt and output")


@click.command("run", cls=SectionedCommand, short_help="Answer one prompt.")
@click.argument("prompt")
@_option("--system", metavar="TEXT", help="System message before the prompt.")
@_option("--raw", is_flag=True, help="Continue PROMPT as it stands, without a chat template.")
@_option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens, usage and timings.")
@sampling_options(temperature=0.0, max_tokens=512)
@engine_options(omit=["seed"])
def command(
    prompt: str,
    system: str | None,
    raw: bool,
    as_json: bool,
    params: SamplingParams,
    options: dict[str, Given],
) -> None:
    """Answer PROMPT with MODEL, streamed to the terminal. PROMPT "-" reads standard input.

    The answer goes to stdout; a closing line with the figures to stderr. The temperature is 0 unless given: the
    same question gets the same, likeliest answer.

    \b
    lockstep run "What is the capital of Japan?"
    lockstep run "List three colours." --json-schema colours.json
    git diff | lockstep run - path/to/model --system "Write a commit message."
    """
    if raw and system is not None:
        raise click.UsageError("--system has no place in a --raw prompt: write it into PROMPT")
    text = sys.stdin.read() if prompt == "-" else prompt
    kernels = native_kernels()
    clock = SystemClock()
    begin_s = clock.now_s()
    with open_llm(options) as llm:
        load_s = clock.now_s() - begin_s
        answer = Answer(clock)
        outputs = llm.stream(text, params) if raw else llm.stream_chat(_messages(system, text), params)
        for piece in answer.follow(outputs):
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps(answer.report(load_s), ensure_ascii=False))
    else:
        click.echo()
        note(f"{answer.closing_line(load_s)} · {kernels}")


def _messages(system: str | None, prompt: str) -> list[dict[str, Any]]:
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]
