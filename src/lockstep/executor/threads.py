"""How many host threads a step uses.

Operators split their work in equal parts and wait for each other, some hundred times a step. When another process
takes one core, every wait lasts until the scheduler returns: a step then takes ten times as long as on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FULL_SHARE = 0.85
"""Of the processor time that its threads could have used, what an undisturbed step gets at least: waiting threads
spin, so they count as busy."""
SHARING_FULL_SHARE = 0.55
"""The same where threads take work as they become free: one that loses its core for a moment holds nobody up, so that
two are better than one as long as the second gets a good part of its core."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 8.0
SHORTEST_JUDGED_S = 2e-3


class ThreadGovernor:
    """All threads while the cores are ours, one while they are not.

    A step whose threads did not get their processor time switches to one thread for a while, doubling with every
    failed return. Costs two clock readings a step.
    """

    def __init__(
        self,
        num_threads: int,
        set_num_threads: Callable[[int], None],
        *,
        full_share: float = FULL_SHARE,
        wall_s: Callable[[], float] = time.perf_counter,
        processor_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._num_threads = num_threads
        self._set_num_threads = set_num_threads
        self._full_share = full_share
        self._wall_s = wall_s
        self._processor_s = processor_s
        self._single_until_s = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._threads_now = num_threads

    @contextmanager
    def step(self) -> Iterator[int]:
        """Run one step inside; yields the number of threads it has."""
        if self._num_threads == 1:
            yield 1
            return
        begin_s, begin_processor_s = self._wall_s(), self._processor_s()
        self._use(1 if begin_s < self._single_until_s else self._num_threads)
        yield self._threads_now
        wall_s = self._wall_s() - begin_s
        if self._threads_now > 1 and wall_s > SHORTEST_JUDGED_S:
            self._judge(wall_s, self._processor_s() - begin_processor_s)

    def _judge(self, wall_s: float, processor_s: float) -> None:
        if processor_s < self._full_share * wall_s * self._threads_now:
            self._single_until_s = self._wall_s() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        else:
            self._backoff_s = max(self._backoff_s / 2, FIRST_BACKOFF_S)

    def _use(self, num_threads: int) -> None:
        if num_threads != self._threads_now:
            self._threads_now = num_threads
            self._set_num_threads(num_threads)
