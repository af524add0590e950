"""The entry point: runs one command, and turns every outcome into an exit code and at most one line.

0: done. 1: a check failed, the engine died, or nobody reads the output. 2: bad usage, model, option or request.
130: interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from lockstep.cli.interrupts import prompt_interrupts

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name; None: the process's) and returns the exit code."""
    try:
        # Before all else that takes time, imports included.
        with prompt_interrupts():
            return _outcome(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _outcome(arguments: Sequence[str] | None) -> int:
    import click

    from lockstep.cli.group import lockstep
    from lockstep.config.environment import debugging

    _open_standard_streams()
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
    except click.exceptions.Abort:
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


def _open_standard_streams() -> None:
    """Those that the caller closed read and write nothing, and no other file takes their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open to the end


def _explain(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    import click

    from lockstep.cli.group import usage_text
    from lockstep.config.environment import DEBUG
    from lockstep.core.errors import EngineDead, IntegrityError, LockstepError, PlacementError

    if isinstance(error, click.UsageError):
        return usage_text(error), BAD_USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), BAD_USAGE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the output cannot be written: {error.strerror}", FAILED
    if isinstance(error, LockstepError):
        failed = isinstance(error, (EngineDead, IntegrityError, PlacementError))
        return str(error), FAILED if failed else BAD_USAGE
    return f"internal error: {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)", FAILED


if __name__ == "__main__":
    sys.exit(main())
