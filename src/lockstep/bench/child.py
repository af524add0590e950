"""A contender in a process of its own, so that memory and threads do not mix.

Commands go to its stdin, replies come from its stdout, one JSON document a line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lockstep.bench.contender import Contender, Round
from lockstep.bench.workload import Job
from lockstep.config import Given
from lockstep.core.errors import ConfigError, EngineDead, LockstepError
from lockstep.core.output import ModelCard

EXIT_GRACE_S = 15


class Open(msgspec.Struct, tag=True):
    """The first command: which contender, with which options."""

    contender: str
    options: dict[str, Any]


class Run(msgspec.Struct, tag=True):
    """Answer these jobs."""

    jobs: list[Job]
    fresh: bool


class Opened(msgspec.Struct, tag=True):
    """The model is ready."""

    card: ModelCard
    caches_prefixes: bool


class Done(msgspec.Struct, tag=True):
    """The jobs are answered."""

    round: Round


class Failed(msgspec.Struct, tag=True):
    """The command could not be followed, with the text for the user."""

    message: str


Command = Open | Run
Reply = Opened | Done | Failed


class ChildContender:
    """The contender called `name`, behind a pipe. Raises LockstepError with the child's own text."""

    def __init__(self, name: str, options: Mapping[str, Given]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.bench.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            opened = self._ask(Open(name, {key: given.value for key, given in options.items()}), Opened)
        except BaseException:
            self.close()
            raise
        self.card, self.caches_prefixes = opened.card, opened.caches_prefixes

    def run(self, jobs: Sequence[Job], *, fresh: bool = True) -> Round:
        """See Contender."""
        return self._ask(Run(list(jobs), fresh), Done).round

    def close(self) -> None:
        """Ends the process: its stdin closes, and if that is not enough it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, command: Command, expected: type[Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise EngineDead(
                f"the process of {self.name} ended in the middle of the measure; see its output above"
            )
        reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failed):
            raise LockstepError(f"{self.name}: {reply.message}")
        assert isinstance(reply, expected)
        return reply


def make_contender(name: str, options: Mapping[str, Any]) -> Contender:
    """A contender by name, in this process."""
    if name == "lockstep":
        from lockstep.bench.lockstep_contender import LockstepContender

        return LockstepContender(options)
    if name == "transformers":
        from lockstep.bench.transformers_contender import TransformersContender

        return TransformersContender(options)
    raise ConfigError(f"unknown contender {name!r} (known: lockstep, transformers)")


def follow_commands() -> int:
    """The child: reads commands until its stdin closes. Returns the exit code."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What libraries print must not stand between replies.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contender: Contender | None = None
    try:
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=Command)
            reply: Reply
            try:
                if isinstance(command, Open):
                    contender = make_contender(command.contender, command.options)
                    reply = Opened(contender.card, contender.caches_prefixes)
                else:
                    assert contender is not None
                    reply = Done(contender.run(command.jobs, fresh=command.fresh))
            except LockstepError as error:
                reply = Failed(str(error))
            replies.write(msgspec.json.encode(reply) + b"\n")
            replies.flush()
    except KeyboardInterrupt:
        return 130
    finally:
        if contender is not None:
            contender.close()
    return 0


if __name__ == "__main__":
    sys.exit(follow_commands())
