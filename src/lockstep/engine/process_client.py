"""The client of engines that run in processes of their own. Free of torch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from lockstep.config import Given, gather, wanted
from lockstep.config.components import ENGINE_OPTIONS
from lockstep.core.errors import EngineDead, InvalidRequest, LockstepError
from lockstep.core.output import EngineStats, ModelCard, RequestOutput
from lockstep.core.request import Request
from lockstep.core.sampling import Grammar
from lockstep.core.step import SequenceEvent
from lockstep.engine.inbox import EVENTS_PER_S, EVENTS_PER_S_ON_HOST, Inbox, Turns
from lockstep.engine.messages import Abort, AskStats, Event, FlushCache, Rejected, Reply, Sequences, Submit
from lockstep.engine.model_files import open_files, open_tokenizer
from lockstep.engine.output import RequestStream
from lockstep.engine.rejection import rejection
from lockstep.engine.replica import Replica
from lockstep.features.grammar import GrammarCompiler
from lockstep.tokenizer.tokenizer import Tokenizer

_LOG = logging.getLogger("lockstep.engine")
FLUSH_TIMEOUT_S, STATS_TIMEOUT_S = 30.0, 2.0
PING_INTERVAL_S = 1.0
SILENCE_S, SILENT_STEPS = 10.0, 4
"""An engine cannot answer within a step. It is unresponsive after so long, and so many times its longest step so far,
without a sign of life."""
STUCK_GRACE_S = 0.5
"""Time to end for an engine that does not answer; others get longer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
SHUTTING_DOWN = "the server is shutting down"


class _Seat:
    """The place of one replica: its process now, what it owes, and its restarts."""

    def __init__(self) -> None:
        self.replica: Replica | None = None
        self.inboxes: dict[str, Inbox] = {}
        """By the id that the engine knows a request by."""
        self.calls: dict[int, asyncio.Future[Reply]] = {}
        self._heard_s = 0.0
        self._longest_step_s = 0.0

    def hear(self, event: Event) -> None:
        """Takes note of a sign of life."""
        self._heard_s = time.monotonic()
        if isinstance(event, Reply) and event.stats is not None:
            self._longest_step_s = max(self._longest_step_s, event.stats.last_step_s)

    @property
    def silent_s(self) -> float:
        """Time since the last sign of life."""
        return time.monotonic() - self._heard_s

    @property
    def is_responsive(self) -> bool:
        """True while the engine's silence may be a step."""
        return self.is_open and self.silent_s < max(SILENCE_S, SILENT_STEPS * self._longest_step_s)

    @property
    def is_open(self) -> bool:
        """True while new requests may come here."""
        return self.replica is not None and not self.replica.has_ended

    def open(self, replica: Replica) -> None:
        """A new engine takes the seat."""
        self._heard_s, self._longest_step_s = time.monotonic(), 0.0
        self.replica = replica

    def fail(self, error: LockstepError) -> None:
        """Everybody who waits for this engine learns that it is gone."""
        for inbox in self.inboxes.values():
            inbox.fail(error)
        for call in self.calls.values():
            if not call.done():
                call.set_exception(error)
        self.calls.clear()


class ProcessClient:
    """An EngineClient over `dp` engine processes, which are restarted when they die.

    `options` are names of the configuration's options, plain or as Given. A request goes to the replica with the
    fewest unfinished ones. When a replica dies its requests end with EngineDead and a new process is started.
    `native_kernels` is an engine's word for those that serve the model.
    """

    card: ModelCard
    native_kernels: str | None
    tokenizer: Tokenizer

    def __init__(
        self, options: Mapping[str, Any], *, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._given: dict[str, Given] = {
            name: given for name, given in gather(options).items() if name in ENGINE_OPTIONS
        }
        self._on_progress = on_progress
        self._numbers = itertools.count()
        self._events_per_s = EVENTS_PER_S_ON_HOST
        self._turns = Turns(self._give_all)
        self._seats: list[_Seat] = []
        self._running: dict[str, tuple[_Seat, str]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._closing = False

    @property
    def is_alive(self) -> bool:
        """True while at least one replica takes requests."""
        return any(seat.is_open for seat in self._seats)

    @property
    def is_responsive(self) -> bool:
        """False when every replica has been silent for longer than a step explains."""
        return any(seat.is_responsive for seat in self._seats)

    @property
    def max_queued_requests(self) -> int:
        """How many requests may wait in each replica."""
        limit: int = wanted(self._given, "max_queued_requests")
        return limit

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the running replicas."""
        return [seat.replica.pid for seat in self._seats if seat.replica is not None and seat.replica.pid]

    async def start(self) -> None:
        """Opens the tokenizer here and starts the engines. Raises what stopped them."""
        self.tokenizer = await asyncio.to_thread(self._open_tokenizer)
        self._grammars = GrammarCompiler(self.tokenizer)
        self._seats = [_Seat() for _ in range(wanted(self._given, "dp"))]
        started = [asyncio.Event() for _ in self._seats]
        self._keepers = [
            asyncio.create_task(self._keep(seat, event))
            for seat, event in zip(self._seats, started, strict=True)
        ]
        waits = [asyncio.create_task(event.wait()) for event in started]
        try:
            for wait, keeper in zip(waits, self._keepers, strict=True):
                await asyncio.wait({wait, keeper}, return_when=asyncio.FIRST_COMPLETED)
                if keeper.done():
                    keeper.result()
        except BaseException:
            await self.close()
            raise
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Ends every request, with EngineDead, then every engine. May be called twice."""
        self._closing = True
        for seat in self._seats:
            seat.fail(EngineDead(f"{SHUTTING_DOWN}; the request was not completed"))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """See EngineClient."""
        if request.request_id in self._running:
            raise InvalidRequest(
                f"a request with the id {request.request_id!r} is still running", param="request_id"
            )
        seat = self._least_loaded()
        # The client may use an id again while news of the request before are still on their way.
        inner_id = f"{request.request_id}#{next(self._numbers)}"
        inbox = seat.inboxes[inner_id] = Inbox(RequestStream(request, self.tokenizer))
        self._running[request.request_id] = seat, inner_id
        replica = seat.replica
        try:
            await self._send(seat, Submit(replace(request, request_id=inner_id)))
            while True:
                found = await inbox.next()
                yield found
                if found.finished:
                    return
        finally:
            del seat.inboxes[inner_id], self._running[request.request_id]
            if inbox.expects_more and seat.replica is replica and replica is not None:
                # The reader left early. Sending cannot block, and must not be cut by the reader's cancellation.
                with suppress(EngineDead):
                    await asyncio.shield(replica.send(Abort(inner_id)))

    async def abort(self, request_id: str) -> bool:
        """See EngineClient."""
        seat, inner_id = self._running.get(request_id, (None, ""))
        if seat is None or seat.replica is None:
            return False
        await seat.replica.send(Abort(inner_id))
        return True

    async def abort_all(self) -> int:
        """See EngineClient."""
        return sum([await self.abort(request_id) for request_id in list(self._running)])

    async def flush_cache(self) -> int:
        """See EngineClient."""
        return sum(reply.count for reply in await self._call_all(FlushCache, FLUSH_TIMEOUT_S))

    async def stats(self) -> EngineStats:
        """The sum over the replicas that run; times are the slowest's."""
        replies = await self._call_all(AskStats, STATS_TIMEOUT_S)
        return _total([reply.stats for reply in replies if reply.stats is not None])

    def validate_grammar(self, grammar: Grammar) -> None:
        """See EngineClient."""
        self._grammars.validate(grammar)

    def _open_tokenizer(self) -> Tokenizer:
        names = ("model", "revision", "load_format")
        files = open_files(*(wanted(self._given, name) for name in names))
        return open_tokenizer(
            files,
            wanted(self._given, "tokenizer"),
            wanted(self._given, "chat_template"),
            skip=wanted(self._given, "skip_tokenizer_init"),
        )

    def _least_loaded(self) -> _Seat:
        return min(self._alive(), key=lambda seat: (not seat.is_responsive, len(seat.inboxes)))

    def _alive(self) -> list[_Seat]:
        alive = [seat for seat in self._seats if seat.is_open]
        if self._closing or not alive:
            raise self._absence()
        return alive

    async def _send(self, seat: _Seat, command: Submit | AskStats | FlushCache) -> None:
        if seat.replica is None:
            raise self._absence()
        await seat.replica.send(command)

    def _absence(self) -> EngineDead:
        if self._closing:
            return EngineDead(SHUTTING_DOWN)
        return EngineDead("the engine is restarting; try again in a few seconds")

    async def _call_all(self, kind: type[AskStats] | type[FlushCache], timeout_s: float) -> list[Reply]:
        return await asyncio.gather(*(self._call(seat, kind, timeout_s) for seat in self._alive()))

    async def _call(
        self, seat: _Seat, kind: type[AskStats] | type[FlushCache], timeout_s: float | None
    ) -> Reply:
        call_id = next(self._numbers)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        seat.calls[call_id] = answer
        try:
            await self._send(seat, kind(call_id))
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            raise EngineDead(
                f"the engine did not answer within {timeout_s:.0f} s; it is in a long step, or stuck"
            ) from None
        finally:
            seat.calls.pop(call_id, None)

    async def _keep(self, seat: _Seat, started: asyncio.Event) -> None:
        """Keeps an engine in this seat until cancelled. A failure before the first start is the caller's."""
        pause_s = FIRST_PAUSE_S
        while True:
            replica = Replica(self._given, None if started.is_set() else self._on_progress)
            try:
                ready = await replica.start()
                self.card, self.native_kernels = ready.card, ready.native_kernels
                self._events_per_s = EVENTS_PER_S_ON_HOST if ready.computes_on_host else EVENTS_PER_S
                seat.open(replica)
                started.set()
                pause_s = FIRST_PAUSE_S
                await self._pump(seat, replica)
            except Exception as error:  # whatever ended this engine, there must be another
                if not started.is_set():
                    raise
                expected = isinstance(error, LockstepError)
                _LOG.error("%s; starting it again", error, exc_info=None if expected else error)
                seat.replica = None
                seat.fail(EngineDead(f"{error}; the request was not completed"))
            finally:
                is_stuck = seat.replica is not None and seat.silent_s > 2 * PING_INTERVAL_S
                seat.replica = None
                await _finish(replica.close(STUCK_GRACE_S) if is_stuck else replica.close())
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _ping(self, seat: _Seat) -> None:
        """Asks the engine of this seat for signs of life, one at a time, until it is gone."""
        with suppress(EngineDead):
            while True:
                await asyncio.sleep(PING_INTERVAL_S)
                await self._call(seat, AskStats, None)

    async def _pump(self, seat: _Seat, replica: Replica) -> None:
        """Carries the replica's events to their readers until it dies, which raises EngineDead."""
        pinging = asyncio.create_task(self._ping(seat))
        try:
            while True:
                event = await replica.receive()
                seat.hear(event)
                await self._deliver(event, seat, replica)
        finally:
            pinging.cancel()

    def _give_all(self) -> None:
        for seat in self._seats:
            for inbox in seat.inboxes.values():
                inbox.give()

    async def _deliver(self, event: Event, seat: _Seat, replica: Replica) -> None:
        """Gives an event to whom it concerns."""
        if isinstance(event, Sequences):
            for request_id in _distribute(event.events, seat.inboxes):
                await replica.send(Abort(request_id))
            num_readers = sum(len(each.inboxes) for each in self._seats)
            self._turns.ask(num_readers / self._events_per_s)
        elif isinstance(event, Rejected):
            inbox = seat.inboxes.get(event.request_id)
            if inbox is not None and inbox.expects_more:
                inbox.fail(rejection(event))
        elif isinstance(event, Reply):
            call = seat.calls.get(event.call_id)
            if call is not None and not call.done():
                call.set_result(event)


def _distribute(events: Sequence[SequenceEvent], inboxes: Mapping[str, Inbox]) -> list[str]:
    """Puts events into inboxes; the requests that the engine must be told to end. Unknown ones are ignored."""
    to_abort = []
    for event in events:
        inbox = inboxes.get(event.request_id)
        if inbox is not None and inbox.expects_more:
            inbox.add(event)
            if inbox.engine_unaware:
                to_abort.append(event.request_id)
    return to_abort


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Waits for `work` even when cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _total(snapshots: list[EngineStats]) -> EngineStats:
    def combine(name: str) -> Any:
        values = [getattr(snapshot, name) for snapshot in snapshots]
        if name == "uptime_s":
            return min(values, default=0.0)
        return max(values, default=0) if name in ("last_step_s", "page_size") else sum(values)

    return EngineStats(**{field.name: combine(field.name) for field in fields(EngineStats)})
