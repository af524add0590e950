"""`lockstep chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lockstep.cli.answer import Answer, note
from lockstep.cli.opening import open_llm, require_chat_template
from lockstep.cli.options import SectionedCommand, engine_options, section
from lockstep.cli.sampling import require_text, sampling_options, started
from lockstep.config import Given
from lockstep.core.errors import InvalidRequest, nearest
from lockstep.core.sampling import SamplingParams

if TYPE_CHECKING:
    from lockstep.engine.llm import LLM

COMMANDS = {
    "/help": "show this list",
    "/reset": "forget the conversation, keep the system message",
    "/system TEXT": "set the system message and start again; without TEXT, none",
    "/quit": "leave (so does Ctrl-D)",
}
_MAX_TOKENS = 1024
_option = section("Prompt and output")


@click.command("chat", cls=SectionedCommand, short_help="Talk with the model.")
@_option("--system", metavar="TEXT", help="System message of the conversation.")
@sampling_options(temperature=0.7, max_tokens=_MAX_TOKENS)
@engine_options(omit=["seed"])
def command(system: str | None, params: SamplingParams, options: dict[str, Given]) -> None:
    """Talk with MODEL. Each answer continues the conversation; what was said before stays in the prefix cache.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else can be typed.
    """
    with open_llm(options) as llm:
        require_chat_template(llm)
        note(f"{llm.card.name} · /help for commands, Ctrl-C stops an answer, Ctrl-D leaves")
        Conversation(llm, params, system).run()


class Conversation:
    """The messages so far, and the loop that grows them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._messages: list[dict[str, Any]] = []

    def run(self) -> None:
        """Reads lines until /quit or the end of input."""
        while (line := _read_line()) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                try:
                    require_text(line)
                except click.UsageError as error:
                    note(str(error))
                else:
                    self._answer(line)

    def _obey(self, line: str) -> bool:
        """Runs one slash command; False when it ends the conversation."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/help":
            for usage, meaning in COMMANDS.items():
                note(f"{usage:<14} {meaning}")
        elif name == "/reset":
            self._messages.clear()
            note("conversation forgotten")
        elif name == "/system":
            self._system = rest.strip() or None
            self._messages.clear()
            note("system message set" if self._system else "no system message")
        else:
            known = [usage.split()[0] for usage in COMMANDS]
            note(f"unknown command {name!r}{nearest(name, known)} (/help lists them)")
        return True

    def _answer(self, question: str) -> None:
        """Streams one answer. A stopped answer stays in the conversation; a refused question does not."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = {"role": "user", "content": question}
        answer = Answer()
        try:
            ask = partial(self._llm.stream_chat, [*system, *self._messages, asked])
            outputs = started(ask, self._params, max_tokens=_MAX_TOKENS)
            with interruption() as interrupted, closing(answer.follow(outputs)) as pieces:
                for piece in pieces:
                    click.echo(piece, nl=False)
                    if interrupted:
                        break
        except InvalidRequest as error:
            note(f"{error} (/reset starts again)")
            return
        click.echo()
        self._messages += [asked, {"role": "assistant", "content": answer.text}]
        note("stopped" if interrupted else answer.closing_line())


@contextmanager
def interruption() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C is pressed.

    The signal is only noted, so that it never cuts a step of the engine in two; a second one interrupts.
    """
    signals: list[int] = []

    def note_signal(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, note_signal)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line() -> str | None:
    """One line from the user, None at the end of input. Ctrl-C gives up the line."""
    if sys.stdin.isatty():
        # Gives input() editing and history.
        import readline  # noqa: F401
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""
