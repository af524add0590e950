"""What waits for the reader of one request, and when readers are given what waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lockstep.core.errors import LockstepError
from lockstep.core.output import RequestOutput
from lockstep.core.step import SequenceEvent
from lockstep.engine.output import RequestStream

EVENTS_PER_S = 5000
"""Outputs that all readers of a process together are given at most: each is an event to build, send and parse, and a
process that does so without a pause answers new requests late."""
EVENTS_PER_S_ON_HOST = 600
"""The same where the engine computes on the host, whose cores the events take from it: one costs the server and a
client beside it as much as a small model's token. Sixteen readers get some thirty a second each, as smooth as film."""


class Inbox:
    """News of one request, and at last perhaps an error. The reader gets all that came as one output, when it is given.

    What comes first and what comes last is given at once.
    """

    def __init__(self, stream: RequestStream) -> None:
        self._stream = stream
        self._error: LockstepError | None = None
        self._is_given = False
        self._was_given = False
        self._reader: asyncio.Future[None] | None = None

    @property
    def expects_more(self) -> bool:
        """True until the request has ended or failed."""
        return not self._stream.finished and self._error is None

    @property
    def engine_unaware(self) -> bool:
        """True when a stop string ended the request, which the engine must be told."""
        return self._stream.finished and self._stream.engine_unaware

    def add(self, event: SequenceEvent) -> None:
        """Notes what a step found."""
        self._stream.add(event)
        if self._stream.finished or not self._was_given:
            self.give()

    def fail(self, error: LockstepError) -> None:
        """Adds the error that ends the request; the reader gets it after what came before."""
        self._error = self._error or error
        self.give()

    def give(self) -> None:
        """Lets the reader have what is there."""
        if not self._stream.has_news and self._error is None:
            return
        self._is_given = self._was_given = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> RequestOutput:
        """Everything new as one output, once it is given. Raises the error once the outputs before it were read."""
        if not self._is_given:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        output = self._stream.take()
        if output is not None:
            self._is_given = self._error is not None
            return output
        assert self._error is not None
        raise self._error


class Turns:
    """Decides when all readers are given what came: together, and with the engine's news where it can.

    Between two steps an engine on the host leaves a core idle, and a client that reads many streams finds them all.
    """

    def __init__(self, give: Callable[[], None]) -> None:
        self._give = give
        self._last_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, interval_s: float) -> None:
        """There are news. Readers get them now, unless they got some within the last `interval_s`: then at the first
        call after that, or when twice the time is over without one."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._last_s + interval_s:
            self._take_turn()
        elif self._timer is None:
            self._timer = loop.call_at(self._last_s + 2 * interval_s, self._take_turn)

    def _take_turn(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last_s = asyncio.get_running_loop().time()
        self._give()
