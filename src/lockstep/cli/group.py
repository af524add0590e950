"""The command of all commands, and what its users are told of their mistakes."""

from __future__ import annotations

import importlib

import click

from lockstep import __version__
from lockstep.core.errors import nearest

COMMANDS = {
    "run": "Answer one prompt.",
    "chat": "Talk with the model.",
    "serve": "Serve the model over HTTP (OpenAI-compatible), with a page at /.",
    "bench": "Measure throughput, latency, serving and startup.",
    "eval": "Measure accuracy, with an interval; gate on it.",
    "baseline": "Record this machine's speed; check later speeds against it.",
    "ops": "List operators and kernels; say which kernel serves what, and why.",
    "explain": "Say who decided each option, and where memory goes.",
    "suites": "List, plan and run suites of tests; say what a change touches.",
    "platform": "Start a package for a device that Lockstep does not know.",
}
"""Command -> its line in the help. Each is `command` in the module of its name, imported when it is called."""


class LazyCommands(click.Group):
    """A group whose commands are imported only when one of them is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"lockstep.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="lockstep", message="%(prog)s %(version)s")
def lockstep() -> None:
    """An inference engine for language models that can show that its answers are right.

    MODEL is a directory in Hugging Face layout, a .gguf file, a Hub id, or omitted: then the embedded small
    model answers.

    \b
    lockstep run "What is the capital of Japan?"
    lockstep chat path/to/model.gguf
    lockstep serve --port 8000
    """


def usage_text(error: click.UsageError) -> str:
    """One line: what was wrong, the nearest that exists, and where help is."""
    context = error.ctx
    text = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        flags = [flag for param in context.command.get_params(context) for flag in param.opts]
        text = f"unknown option {error.option_name}{nearest(error.option_name, flags)}"
    elif (
        context is not None and isinstance(context.command, click.Group) and text.startswith("No such command")
    ):
        name = text.split("'")[1]
        text = f"unknown command {name!r}{nearest(name, context.command.list_commands(context))}"
    else:
        text = text[0].lower() + text[1:]
    return text + (f" (see `{context.command_path} --help`)" if context is not None else "")
