"""What waits for the reader of one request."""

from __future__ import annotations

import asyncio

from lockstep.core.errors import LockstepError
from lockstep.core.output import RequestOutput, merged

EVENTS_PER_S = 5000
"""Outputs that all readers of a process together are given at most: each is an event to build, send and parse, and a
process that does so without a pause answers new requests late."""
EVENTS_PER_S_ON_HOST = 1000
"""The same where the engine computes on the host, whose cores the events take from it: one takes about as long as a
small model needs for a token. A reader's share is still far more than an eye follows."""


class Inbox:
    """Outputs of one request in order, and at last perhaps an error. Those that come while nobody reads are merged.

    All readers together are given `events_per_s` of them at most.
    """

    def __init__(self, events_per_s: int) -> None:
        self._events_per_s = events_per_s
        self._queue: asyncio.Queue[RequestOutput | LockstepError] = asyncio.Queue()
        self._error: LockstepError | None = None
        self._last_s = float("-inf")

    def put(self, news: RequestOutput | LockstepError) -> None:
        """Adds an output, or the error that ends the request."""
        self._queue.put_nowait(news)

    async def next(self, num_readers: int) -> RequestOutput:
        """Everything new, as one output: the first and the last at once, others no sooner than this reader's turn.

        `num_readers` share the process. Raises the error once the outputs before it were given.
        """
        if self._error is not None:
            raise self._error
        found = await self._queue.get()
        if isinstance(found, LockstepError):
            raise found
        loop = asyncio.get_running_loop()
        wait_s = self._last_s + num_readers / self._events_per_s - loop.time()
        if wait_s > 0 and not found.finished:
            await asyncio.sleep(wait_s)
        self._last_s = loop.time()
        outputs = [found]
        while not self._queue.empty():
            more = self._queue.get_nowait()
            if isinstance(more, LockstepError):
                self._error = more
                break
            outputs.append(more)
        return merged(outputs)
