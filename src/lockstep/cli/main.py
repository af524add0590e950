"""The entry point: finds the command, runs it, and turns every outcome into an exit code and at most one line.

0: done. 1: a check failed, the engine died, or nobody reads the output. 2: bad usage, model, option or request.
130: interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from lockstep import __version__
from lockstep.config.environment import DEBUG, debugging
from lockstep.core.errors import EngineDead, IntegrityError, LockstepError, PlacementError, nearest

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

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_FAILURES = (EngineDead, IntegrityError, PlacementError)


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
    cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name; None: the process's) and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Text of a model may hold characters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        outcome = lockstep.main(arguments, prog_name="lockstep", standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else OK
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return OK
    except (click.exceptions.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debugging():
            raise
        message, code = _explain(error)
        click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, click.UsageError):
        return _usage_text(error), BAD_USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), BAD_USAGE
    if isinstance(error, LockstepError):
        return str(error), FAILED if isinstance(error, _FAILURES) else BAD_USAGE
    return f"internal error: {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)", FAILED


def _usage_text(error: click.UsageError) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
