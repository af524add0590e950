"""The first rank's loop: commands in, deadlines and seeds decided, one step, events out."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lockstep.core.clock import Clock, SystemClock
from lockstep.core.output import EngineStats
from lockstep.core.request import Request
from lockstep.core.step import SequenceEvent
from lockstep.engine.core import EngineCore
from lockstep.engine.messages import Abort, FlushCache, Rejected, Reply, Shutdown, StepInputs, Submit


class EngineLoop:
    """Everything that must be decided once, before ranks do the same thing: seeds, deadlines, order of arrival.

    `broadcast` sends the inputs of a step to the further ranks, before this rank computes it.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        seed: int = 0,
        broadcast: Callable[[StepInputs], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.core = core
        self._seed = seed
        self._broadcast = broadcast
        self._clock = clock or SystemClock()
        self._started_s = self._clock.now_s()
        self._num_requests = itertools.count()
        self._num_steps = itertools.count()
        self._deadlines: list[tuple[float, str]] = []
        self._due_s: dict[str, float] = {}
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""
        return self.core.scheduler.has_work

    def seconds_to_deadline(self) -> float | None:
        """Time until the next deadline; None when there is none."""
        return max(0.0, self._deadlines[0][0] - self._clock.now_s()) if self._deadlines else None

    def run_once(
        self, commands: Sequence[Submit | Abort | FlushCache | Shutdown]
    ) -> tuple[list[SequenceEvent], list[Rejected | Reply]]:
        """Apply the commands, then compute one step if anything is owed."""
        settled = [self._settle(command) for command in commands]
        settled += [Abort(request_id, "deadline") for request_id in self._expired()]
        if not settled and not self.has_work:
            return [], []
        if self._broadcast is not None:
            self._broadcast(StepInputs(next(self._num_steps), settled, self.core.digest))
        events, answers = self.core.apply(settled)
        begin_s = time.perf_counter()
        events += self.core.step()
        self._last_step_s = time.perf_counter() - begin_s
        return events, answers

    def stats(self) -> EngineStats:
        """A snapshot of the scheduler, with this loop's times."""
        return replace(
            self.core.scheduler.stats(),
            last_step_s=self._last_step_s,
            uptime_s=self._clock.now_s() - self._started_s,
        )

    def _settle(
        self, command: Submit | Abort | FlushCache | Shutdown
    ) -> Submit | Abort | FlushCache | Shutdown:
        if not isinstance(command, Submit):
            return command
        request = command.request
        number = next(self._num_requests)
        # An id may come back: only the deadline of its latest request counts.
        self._due_s.pop(request.request_id, None)
        if request.deadline_s is not None:
            due_s = self._due_s[request.request_id] = self._clock.now_s() + request.deadline_s
            heapq.heappush(self._deadlines, (due_s, request.request_id))
        return Submit(self._with_seed(request, number))

    def _with_seed(self, request: Request, number: int) -> Request:
        """Requests without a seed draw theirs from the engine's and their number."""
        if request.params.seed is not None:
            return request
        seed = (self._seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % 2**64
        return replace(request, params=request.params.with_seed(seed))

    def _expired(self) -> list[str]:
        expired = []
        now_s = self._clock.now_s()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            due_s, request_id = heapq.heappop(self._deadlines)
            if self._due_s.get(request_id) == due_s:
                del self._due_s[request_id]
                expired.append(request_id)
        return expired
