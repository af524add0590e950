"""`lockstep run`: one answer."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import click

from lockstep.cli.answer import Answer, note
from lockstep.cli.opening import open_llm, require_chat_template
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.sampling import require_text, sampling_options, started
from lockstep.config import Given
from lockstep.core.clock import SystemClock
from lockstep.core.sampling import SamplingParams

_MAX_TOKENS = 512
_option = section("Prompt and output")


@click.command("run", cls=SectionedCommand, short_help="Answer one prompt.")
@click.argument("prompt")
@_option("--system", metavar="TEXT", help="System message before the prompt.")
@_option("--raw", is_flag=True, help="Continue PROMPT as it stands, without a chat template.")
@_option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens, usage and timings.")
@sampling_options(temperature=0.0, max_tokens=_MAX_TOKENS)
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
    if not text.strip():
        raise click.UsageError("the prompt is empty" if prompt != "-" else "standard input holds no prompt")
    require_text(text + (system or ""))
    clock = SystemClock()
    begin_s = clock.now_s()
    with open_llm(options) as llm:
        load_s = clock.now_s() - begin_s
        if not raw:
            require_chat_template(llm, "; --raw continues PROMPT as it stands")
        answer = Answer(clock)
        ask = partial(llm.stream, text) if raw else partial(llm.stream_chat, _messages(system, text))
        for piece in answer.follow(started(ask, params, max_tokens=_MAX_TOKENS)):
            if not as_json:
                click.echo(piece, nl=False)
        kernels = llm.native_kernels
    if as_json:
        click.echo(json.dumps(answer.report(load_s), ensure_ascii=False))
    else:
        click.echo()
        note(" · ".join(filter(None, (answer.closing_line(load_s), kernels))))


def _messages(system: str | None, prompt: str) -> list[dict[str, Any]]:
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]
