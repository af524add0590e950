"""What waits for the reader of one request."""

from __future__ import annotations

import asyncio

from lockstep.core.errors import LockstepError
from lockstep.core.output import RequestOutput, merged

EVENTS_PER_S = 1000
"""Outputs that all readers of a process together are given at most: each is an event to build, send and parse, which
takes about as long as a small model needs for a token. A reader's share is still far more than an eye follows."""


class Inbox:
    """Outputs of one request in order, and at last perhaps an error. Those that come while nobody reads are merged."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RequestOutput | LockstepError] = asyncio.Queue()
        self._error: LockstepError | None = None
        self._last_s = float("-inf")

    def put(self, news: RequestOutput | LockstepError) -> None:
        """Adds an output, or the error that ends the request."""
        self._queue.put_nowait(news)

    async def next(self, num_readers: int) -> RequestOutput:
        """Everything new, as one output: the first and the last at once, others no sooner than this reader's turn.

        `num_readers` share EVENTS_PER_S. Raises the error once the outputs before it were given.
        """
        if self._error is not None:
            raise self._error
        found = await self._queue.get()
        if isinstance(found, LockstepError):
            raise found
        loop = asyncio.get_running_loop()
        wait_s = self._last_s + num_readers / EVENTS_PER_S - loop.time()
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
