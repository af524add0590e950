"""Entry of a further rank's process: build, then follow the first rank's stream."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import zmq

from lockstep.core.errors import LockstepError
from lockstep.core.garbage import start_without_collecting
from lockstep.engine.messages import Failed, Ready, Shutdown, WorkerSpec, decode_inputs, encode
from lockstep.engine.ranks import follow_lifeline

LIFELINE_S = 0.5
"""More than enough for the end of the first rank to be known."""


def main() -> None:
    """Reads a WorkerSpec from standard input and runs until it is told to stop or the first rank is gone."""
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerSpec)
    follow_lifeline(Path(spec.store).parent)
    context = zmq.Context()
    events: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    events.connect(spec.events_address)
    inputs: zmq.Socket[bytes] = context.socket(zmq.PULL)
    inputs.connect(spec.inputs_address)
    try:
        _run(spec, inputs, events)
    except Exception as error:  # the first rank must learn why, whatever it was
        events.send(encode(Failed(type(error).__name__, f"rank {spec.rank}: {error}")))
        events.close(linger=2000)
        if not isinstance(error, LockstepError):
            # A collective breaks when the first rank dies: then the lifeline ends this process here, quietly.
            time.sleep(LIFELINE_S)
            raise
        raise SystemExit(1) from None


def _run(spec: WorkerSpec, inputs: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
    with start_without_collecting():
        from lockstep.engine.assembly import assemble_rank

        built = assemble_rank(spec.config, rank=spec.rank, store=Path(spec.store))
    events.send(encode(Ready(built.card, [])))
    while True:
        message = decode_inputs(inputs.recv())
        if any(isinstance(command, Shutdown) for command in message.commands):
            return
        built.rank.core.follow(message)


if __name__ == "__main__":
    main()
