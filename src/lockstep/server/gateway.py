"""The one place where HTTP meets the engine: names, deadlines, request ids, merged streams, timing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from lockstep.config.components import ServerOptions
from lockstep.core.clock import Clock, SystemClock
from lockstep.core.errors import InvalidRequest
from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.request import Request
from lockstep.engine.client import EngineClient
from lockstep.features.grammar import INVALID_GRAMMAR, failed_by_grammar
from lockstep.server.conversion import Constraint
from lockstep.server.errors import GenerationFailed, UnknownModel
from lockstep.server.metrics import Metrics

MAX_PARALLEL_PROMPTS = 64
"""Prompts of one HTTP request that are in the engine at once, so that one client cannot fill the queue. Fewer where the
queue is shorter: an idle engine takes every list, however long."""


@dataclass(slots=True)
class _Group:
    """The requests of one HTTP request; those not yet in the engine must learn of an abort too."""

    request_ids: tuple[str, ...]
    constraint: Constraint | None = None
    aborted: bool = False


class Gateway:
    """Runs requests on an engine client on behalf of HTTP handlers."""

    def __init__(
        self, client: EngineClient, options: ServerOptions, metrics: Metrics, clock: Clock | None = None
    ) -> None:
        self.client = client
        self.options = options
        self.metrics = metrics
        self._clock = clock or SystemClock()
        self.started_at_s = int(time.time())
        self._groups: dict[str, _Group] = {}

    @property
    def model_name(self) -> str:
        """The name of the model for clients."""
        return self.client.card.name

    @property
    def num_running(self) -> int:
        """HTTP requests that the engine works on or that wait for it."""
        return len(self._groups)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is absent, empty or the served name."""
        if name and name != self.model_name:
            raise UnknownModel(name, self.model_name)

    async def abort(self, group_id: str) -> int:
        """Ends the requests that arrived under this id; returns how many the engine was working on."""
        group = self._groups.get(group_id)
        if group is None:
            return 0
        group.aborted = True
        return sum([await self.client.abort(request_id) for request_id in group.request_ids])

    async def abort_all(self) -> int:
        """Ends every request; returns how many the engine was working on."""
        for group in self._groups.values():
            group.aborted = True
        return await self.client.abort_all()

    async def outputs(
        self, group_id: str, requests: Sequence[Request], constraint: Constraint | None = None
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Outputs of all requests as they come, each with the position of its request.

        `constraint` is what all of them are held to. Closing the generator aborts what still runs. Raises
        GenerationFailed, InvalidRequest (also in the middle, when a grammar cannot go on), QueueFull and EngineDead;
        one failing request ends the others.
        """
        if group_id in self._groups:
            raise InvalidRequest(f"a request with the id {group_id!r} is still running", param="request_id")
        group = self._groups[group_id] = _Group(tuple(request.request_id for request in requests), constraint)
        try:
            several = len(requests) > 1
            source = self._merged(group, requests) if several else self._timed(group, 0, requests[0])
            async with aclosing(source) as arriving:
                async for item in arriving:
                    yield item
        finally:
            del self._groups[group_id]

    async def _merged(
        self, group: _Group, requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        arrivals: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(
            MAX_PARALLEL_PROMPTS
        )
        gate = asyncio.Semaphore(min(MAX_PARALLEL_PROMPTS, self.client.max_queued_requests))

        async def forward(index: int, request: Request) -> None:
            async with aclosing(self._timed(group, index, request)) as outputs:
                async for item in outputs:
                    await arrivals.put(item)

        async def pump(index: int, request: Request) -> None:
            try:
                async with gate:
                    if group.aborted:
                        await arrivals.put((index, _aborted(request)))
                    else:
                        await forward(index, request)
                await arrivals.put(None)
            except Exception as error:
                await arrivals.put(error)

        tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        num_open = len(tasks)
        try:
            while num_open:
                item = await arrivals.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _timed(
        self, group: _Group, index: int, request: Request
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        started_s = self._clock.now_s()
        last_s: float | None = None
        async with aclosing(self.client.generate(self._with_deadline(request))) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                _raise_if_failed(output, group.constraint)
                now_s = self._clock.now_s()
                num_new = max([len(delta.token_ids) for delta in output.deltas], default=0)
                if num_new and last_s is None:
                    self.metrics.ttft_s.observe(now_s - started_s)
                elif num_new and last_s is not None:
                    self.metrics.inter_token_s.observe((now_s - last_s) / num_new)
                last_s = now_s if num_new else last_s
                if output.finished:
                    self.metrics.e2e_s.observe(now_s - started_s)
                yield index, output

    def _with_deadline(self, request: Request) -> Request:
        limits_s = [limit for limit in (request.deadline_s, self.options.request_timeout_s) if limit]
        return replace(request, deadline_s=min(limits_s)) if limits_s else request


def _raise_if_failed(output: RequestOutput, constraint: Constraint | None) -> None:
    for delta in output.deltas:
        if delta.finish_reason == "error":
            if constraint is not None and failed_by_grammar(delta.error or ""):
                raise InvalidRequest(delta.error or "", param=constraint.param, code=INVALID_GRAMMAR)
            raise GenerationFailed(f"generation failed: {delta.error or 'the engine gave no reason'}")


def _aborted(request: Request) -> RequestOutput:
    deltas = tuple(CompletionDelta(index, finish_reason="abort") for index in range(request.params.n))
    return RequestOutput(request.request_id, deltas, len(request.prompt_token_ids), 0, 0, finished=True)
