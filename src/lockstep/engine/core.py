"""The part of the engine that every rank runs alike: scheduler and executor, fed by one stream."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain

from lockstep.core.errors import IntegrityError, InvalidRequest, LockstepError, QueueFull
from lockstep.core.step import Executor, Pending, SequenceEvent, StepResult
from lockstep.engine.messages import Abort, FlushCache, Rejected, Reply, Shutdown, StepInputs, Submit
from lockstep.scheduler.scheduler import Scheduler


class EngineCore:
    """Follows a stream of StepInputs. Two cores given the same stream do the same; each can prove it.

    Where the scheduler may have several plans in flight, the next step is planned and submitted before the result of
    the last one is taken, so that the device never waits for the host. Which results are taken when depends on the
    stream alone. `digest` is a running checksum of every token in a result so far. A rank whose digest differs from
    the one in the stream has diverged from the first rank and stops with IntegrityError.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.digest = 0
        self._pending: deque[Pending] = deque()

    def apply(
        self, commands: Sequence[Submit | Abort | FlushCache | Shutdown]
    ) -> tuple[list[SequenceEvent], list[Rejected | Reply]]:
        """Admits, ends, flushes, in order. Gives the ends' events, and rejections and replies."""
        events: list[SequenceEvent] = []
        answers: list[Rejected | Reply] = []
        for command in commands:
            if isinstance(command, Submit):
                try:
                    self.scheduler.add(command.request)
                except (InvalidRequest, QueueFull) as error:
                    answers.append(reject(command.request.request_id, error))
            elif isinstance(command, Abort):
                events.extend(self.scheduler.abort(command.request_id, command.reason))
            elif isinstance(command, FlushCache):
                answers.append(Reply(command.call_id, count=self.scheduler.flush_cache()))
        return events, answers

    def step(self) -> list[SequenceEvent]:
        """Plans and submits a step, then takes the results that no longer may wait. Empty when there is no news.

        Raises what went wrong in a step whose result was taken, which may be one that was submitted earlier.
        """
        plan = self.scheduler.plan()
        if plan is not None:
            self._pending.append(self.executor.submit(plan))
        ahead = 0 if plan is None or plan.must_land else self.scheduler.limits.max_plans_in_flight - 1
        events: list[SequenceEvent] = []
        while len(self._pending) > ahead:
            result = self._pending.popleft().result()
            self.digest = _extend(self.digest, result)
            events += self.scheduler.update(result)
        return events

    def follow(self, inputs: StepInputs) -> None:
        """One step of a further rank. Raises IntegrityError when it no longer agrees with the first."""
        if inputs.digest != self.digest:
            raise IntegrityError(
                f"ranks diverged before step {inputs.step}: this one chose other tokens than the first "
                f"(digest {self.digest:08x}, expected {inputs.digest:08x})"
            )
        self.apply(inputs.commands)
        self.step()


def reject(request_id: str, error: LockstepError) -> Rejected:
    """The message that tells a client why its request was not admitted."""
    return Rejected(
        request_id,
        kind=type(error).__name__,
        message=str(error),
        param=getattr(error, "param", None),
        code=getattr(error, "code", "invalid_value"),
        retry_after_s=getattr(error, "retry_after_s", 1.0),
    )


def _extend(digest: int, result: StepResult) -> int:
    token_ids = chain.from_iterable([found.token_ids for found in result.sequences])
    return zlib.crc32(array("I", token_ids), digest)
