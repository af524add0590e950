"""The `lockstep` command as a process: its arguments, and a server that lives as long as a measure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lockstep.config import Given
from lockstep.config.components import OPTIONS
from lockstep.core.errors import EngineDead

STOP_GRACE_S = 20
_ANNOUNCEMENT = " at http"


def lockstep_command(
    command: str, options: Mapping[str, Given], *, flags: Sequence[str] = (), arguments: Sequence[str] = ()
) -> list[str]:
    """Runs `lockstep COMMAND` of this installation with engine options, its own flags and arguments (before MODEL)."""
    written, positional = list(flags), list(arguments)
    for name, given in options.items():
        option = OPTIONS[name]
        values = given.value if option.many else [given.value]
        if option.positional:
            positional += values
        elif option.kind is bool:
            written += [option.flag] if given.value else []
        else:
            written += [f"{option.flag}={value}" for value in values]
    return [sys.executable, "-m", "lockstep.cli.main", command, *written, "--", *positional]


@contextmanager
def running_server(command: Sequence[str]) -> Iterator[str]:
    """Starts a server and waits for the line with its address, which it yields; stops it at the end.

    Raises EngineDead when it ends before; its own error is on stderr then.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if _ANNOUNCEMENT in line:
                    yield line.split()[-1]
                    return
            raise EngineDead(f"the server ended with exit code {process.wait()} before it was ready; see above")
        finally:
            process.terminate()
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
