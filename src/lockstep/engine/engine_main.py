"""Entry of an engine process: build, then serve commands until told to stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import zmq

from lockstep.config import Given
from lockstep.core.errors import LockstepError
from lockstep.core.garbage import start_without_collecting
from lockstep.engine.messages import (
    AskStats,
    Command,
    EngineSpec,
    Event,
    Failed,
    LoadProgress,
    Ready,
    Reply,
    Sequences,
    Shutdown,
    decode_command,
    encode,
)
from lockstep.engine.model_files import read_ahead_weights
from lockstep.engine.ranks import follow_lifeline

IDLE_POLL_S = 0.5
PROGRESS_INTERVAL_S = 0.1


def main() -> None:
    """Reads an EngineSpec from standard input and runs until Shutdown, or until its client is gone."""
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSpec)
    run_dir = Path(spec.commands_address.removeprefix("ipc://")).parent
    follow_lifeline(run_dir)
    channel = _Channel(spec)
    try:
        _run(spec, run_dir, channel)
    except Exception as error:  # the client must learn why, whatever it was
        channel.send(Failed(type(error).__name__, str(error)))
        channel.close()
        if not isinstance(error, LockstepError):
            raise
        raise SystemExit(1) from None
    channel.close()


class _Channel:
    """The two sockets to the client."""

    def __init__(self, spec: EngineSpec) -> None:
        self._context = zmq.Context()
        self._commands: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._commands.connect(spec.commands_address)
        self._events: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._events.connect(spec.events_address)

    def send(self, event: Event) -> None:
        self._events.send(encode(event))

    def receive(self, timeout_s: float) -> list[Command]:
        """Every command that is there; waits up to `timeout_s` for the first."""
        found: list[Command] = []
        wait_ms = int(timeout_s * 1000)
        while self._commands.poll(wait_ms if not found else 0):
            found.append(decode_command(self._commands.recv()))
        return found

    def close(self) -> None:
        self._commands.close(linger=0)
        self._events.close(linger=2000)
        self._context.term()


def _run(spec: EngineSpec, run_dir: Path, channel: _Channel) -> None:
    options = {name: Given(_plain(value), source) for name, (value, source) in spec.options.items()}
    read_ahead_weights(options)

    with start_without_collecting():
        from lockstep.engine.assembly import Engine

        engine = Engine(options, run_dir=run_dir, progress=_Throttled(channel))
    try:
        decisions = [
            {"name": made.name, "value": made.value, "source": made.source, "why": made.why}
            for made in engine.opened.decisions
        ]
        on_host = not engine.opened.capabilities.has_streams
        channel.send(Ready(engine.card, decisions, engine.native_kernels, on_host))
        has_more = True
        while True:
            wait_s = 0.0
            if not engine.loop.has_work and not has_more:
                wait_s = min(IDLE_POLL_S, engine.loop.seconds_to_deadline() or IDLE_POLL_S)
            commands = channel.receive(wait_s)
            work = []
            for command in commands:
                if isinstance(command, Shutdown):
                    return
                if isinstance(command, AskStats):
                    channel.send(Reply(command.call_id, stats=engine.loop.stats()))
                else:
                    work.append(command)
            if not commands and not engine.loop.has_work:
                engine.check()
                has_more = engine.prepare_more()
            try:
                events, answers = engine.loop.run_once(work)
            except Exception:
                # A collective that breaks is the symptom; a worker that died is the cause to tell.
                engine.check(patience_s=1.0)
                raise
            for answer in answers:
                channel.send(answer)
            if events:
                channel.send(Sequences(events))
    finally:
        engine.close()


class _Throttled:
    """Passes load progress on a few times a second."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._last_s = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_INTERVAL_S or done == total:
            self._last_s = now_s
            self._channel.send(LoadProgress(done, total))


def _plain(value: object) -> object:
    """JSON has no tuples; options have no lists."""
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
