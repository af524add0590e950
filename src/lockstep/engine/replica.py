"""One engine process, seen from its client. Free of torch."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import zmq
import zmq.asyncio

from lockstep.config import Given
from lockstep.core.errors import (
    ConfigError,
    EngineDead,
    KernelError,
    LockstepError,
    ModelFileError,
    OutOfMemory,
    PlacementError,
)
from lockstep.engine.messages import (
    Command,
    EngineSpec,
    Event,
    Failed,
    LoadProgress,
    Ready,
    Shutdown,
    decode_event,
    encode,
)
from lockstep.engine.ranks import new_run_dir

GRACE_S = 5.0
LAST_WORDS_S = 0.2
"""The last events of a process may still be on their way for so long when its end is known."""
_START_ERRORS: dict[str, type[LockstepError]] = {
    kind.__name__: kind for kind in (ConfigError, ModelFileError, OutOfMemory, KernelError, PlacementError)
}


class Replica:
    """Starts an engine process, carries commands and events, ends it. One life: a new process needs a new Replica.

    The child holds the read end of a pipe whose write end is ours, so it cannot outlive this process.
    """

    def __init__(
        self, options: Mapping[str, Given], on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._options = options
        self._on_progress = on_progress
        self._run_dir: TemporaryDirectory[str] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ending: asyncio.Task[int] | None = None
        self._arrived: deque[bytes] = deque()
        self._has_news = asyncio.Event()
        self.last_word: Failed | None = None

    async def start(self) -> Ready:
        """Returns when the engine takes requests. Raises what stopped it: ConfigError, ModelFileError, OutOfMemory,
        KernelError, PlacementError or EngineDead."""
        self._run_dir = new_run_dir()
        folder = Path(self._run_dir.name)
        self._context = zmq.Context()
        self._commands = zmq.asyncio.Socket(self._context, zmq.PUSH)
        # Read without pyzmq's futures, which take several times as long as the message they bring.
        self._events: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        addresses = [f"ipc://{folder}/{name}" for name in ("commands", "events")]
        for socket, address in zip((self._commands, self._events), addresses, strict=True):
            socket.set_hwm(0)
            socket.bind(address)
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._take_arrived)
        spec = EngineSpec(
            {name: (given.value, given.source) for name, given in self._options.items()},
            addresses[0],
            addresses[1],
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lockstep.engine.engine_main",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        # One for the whole life: asyncio keeps every waiter until the process ends.
        self._ending = asyncio.create_task(self._process.wait())
        self._ending.add_done_callback(lambda _: self._has_news.set())
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
        try:
            await self._process.stdin.drain()
        except ConnectionError:
            pass  # it is dead already, which `_ready` reports
        return await self._ready()

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return self._process.pid if self._process is not None else None

    @property
    def has_ended(self) -> bool:
        """True as soon as the process is gone, although its last events may not have been received yet."""
        return self._process is not None and self._process.returncode is not None

    async def send(self, command: Command) -> None:
        """The queue between us is unbounded, requests are bounded by the engine's scheduler. Raises EngineDead."""
        sending = asyncio.ensure_future(self._commands.send(encode(command)))
        if not sending.done():
            # Nobody is at the other end: not yet, or not any more.
            assert self._ending is not None
            await asyncio.wait({sending, self._ending}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            sending.cancel()
            raise EngineDead(self._obituary())

    async def receive(self) -> Event:
        """The next event. Raises EngineDead when the process has ended and said all it had to say."""
        while not self._arrived:
            self._has_news.clear()
            try:
                await asyncio.wait_for(self._has_news.wait(), LAST_WORDS_S if self.has_ended else None)
            except asyncio.TimeoutError:
                raise EngineDead(self._obituary()) from None
        event = decode_event(self._arrived.popleft())
        if isinstance(event, Failed):
            self.last_word = event
        return event

    def _take_arrived(self) -> None:
        """Reads until nothing is left: the socket's descriptor speaks up only when something new comes."""
        try:
            while True:
                self._arrived.append(self._events.recv(zmq.NOBLOCK))
        except zmq.Again:
            if self._arrived:
                self._has_news.set()

    async def close(self, grace_s: float = GRACE_S) -> None:
        """Asks the engine to stop, ends it after `grace_s`; removes the private folder. May be called twice."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(self._shut_down(process), grace_s)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
        if process is not None and process.stdin is not None:
            process.stdin.close()
        if self._context is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._commands.close(linger=0)
            self._events.close(linger=0)
            self._context.term()
            self._context = None
        if self._run_dir is not None:
            self._run_dir.cleanup()
            self._run_dir = None

    async def _shut_down(self, process: asyncio.subprocess.Process) -> None:
        try:
            await self.send(Shutdown())
        except EngineDead:
            pass  # it left by itself
        await process.wait()

    async def _ready(self) -> Ready:
        while True:
            event = await self.receive()
            if isinstance(event, Ready):
                return event
            if isinstance(event, LoadProgress) and self._on_progress is not None:
                self._on_progress(event.num_loaded, event.num_total)
            if isinstance(event, Failed):
                raise _START_ERRORS.get(event.kind, EngineDead)(event.message)

    def _obituary(self) -> str:
        code = self._process.returncode if self._process is not None else None
        cause = f": {self.last_word.message}" if self.last_word is not None else ""
        return f"the engine process ended unexpectedly (exit code {code}){cause}"
