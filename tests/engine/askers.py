"""Many HTTP clients at once, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from served import COMPLETIONS, events_in

T = TypeVar("T")

DEAD = "engine_dead"


@dataclass
class Outcome:
    """A request that has ended. `broken` is the transport's error when the connection did."""

    status: int
    headers: httpx.Headers
    text: str
    took_s: float
    broken: Exception | None = None

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[Any]:
        return events_in(self.text)

    @property
    def is_complete(self) -> bool:
        """A whole answer: a stream up to [DONE], or the object of a completion."""
        if self.status != 200 or self.broken is not None:
            return False
        return self.events[-1] == "[DONE]" if self.is_stream else "choices" in json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a response, or of the last event of a stream; empty when there is none."""
        if self.broken is not None or not self.text:
            return {}
        last = self.events[-1] if self.is_stream else json.loads(self.text)
        return last.get("error", {}) if isinstance(last, dict) else {}

    @property
    def answer(self) -> str:
        """The text of the first choice, put together."""
        if not self.is_stream:
            return str(_text_of(json.loads(self.text)["choices"][0]))
        chunks = [event for event in self.events if isinstance(event, dict) and event.get("choices")]
        return "".join(_text_of(chunk["choices"][0]) for chunk in chunks)

    @property
    def finish_reason(self) -> str | None:
        """The last one said."""
        bodies = self.events if self.is_stream else [json.loads(self.text)]
        said = [
            body["choices"][0]["finish_reason"] for body in bodies if body != "[DONE]" and body.get("choices")
        ]
        return said[-1] if said else None

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts; a stream must have been asked for them."""
        body = self.events[-2] if self.is_stream else json.loads(self.text)
        return dict(body["usage"])


def _text_of(choice: dict[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or choice
    return said.get("content") or said.get("text") or ""


class Asker:
    """Sends requests over connections that nobody else's wait for."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def ask(
        self, body: dict[str, Any], path: str = COMPLETIONS, begun: asyncio.Event | None = None
    ) -> Outcome:
        """The request's outcome; `begun` is set when the first bytes of the answer are there."""
        begin_s, status, headers = time.monotonic(), 0, httpx.Headers()
        pieces: list[str] = []
        broken = None
        try:
            async with self.http.stream("POST", path, json=body) as response:
                status, headers = response.status_code, response.headers
                async for piece in response.aiter_text():
                    pieces.append(piece)
                    if begun is not None:
                        begun.set()
        except httpx.TransportError as error:
            broken = error
        return Outcome(status, headers, "".join(pieces), time.monotonic() - begin_s, broken)

    def start(self, body: dict[str, Any], path: str = COMPLETIONS) -> Asked:
        """The request on its way."""
        begun = asyncio.Event()
        return Asked(asyncio.create_task(self.ask(body, path, begun)), begun)


@dataclass
class Asked:
    """A request under way: `begun` once the answer has begun to arrive."""

    task: asyncio.Task[Outcome]
    begun: asyncio.Event

    async def outcome(self, within_s: float = 60.0) -> Outcome:
        return await asyncio.wait_for(asyncio.shield(self.task), within_s)

    async def hang_up(self) -> None:
        """Closes the connection, whatever is on its way."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@asynccontextmanager
async def asking(url: str, **options: Any) -> AsyncIterator[Asker]:
    """An Asker with as many connections as it wants."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, **options) as http:
        yield Asker(http)


def story(number: int, max_tokens: int, *, stream: bool = False, **more: Any) -> dict[str, Any]:
    """A completion body that is unlike its neighbours and runs to its full length."""
    body = {
        "prompt": f"Story number {number}: once upon a time",
        "max_tokens": max_tokens,
        "seed": number,
        "ignore_eos": True,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {}) | more


async def outcomes(asked: Sequence[Asked], within_s: float = 60.0) -> list[Outcome]:
    """What became of all of them; fails when one has not ended in time."""
    return await asyncio.wait_for(asyncio.gather(*(one.outcome(within_s) for one in asked)), within_s)


async def all_begun(asked: Sequence[Asked], within_s: float = 60.0) -> None:
    """Returns when each answer has begun to arrive."""
    await asyncio.wait_for(asyncio.gather(*(one.begun.wait() for one in asked)), within_s)


async def some_begun(asked: Sequence[Asked], num: int, within_s: float = 60.0) -> None:
    """Returns when the answers of `num` of them have begun to arrive; who is first is the server's business."""
    until_s = time.monotonic() + within_s
    while sum(one.begun.is_set() for one in asked) < num:
        assert time.monotonic() < until_s, f"fewer than {num} answers began within {within_s} s"
        await asyncio.sleep(0.01)


async def off_loop(work: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """The result of blocking work, while clients go on reading."""
    return await asyncio.to_thread(work, *arguments, **named)
