"""Loads a server over HTTP: many streamed completions at once, each timed token by token."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lockstep.bench.workload import Job
from lockstep.core.errors import ConfigError

if TYPE_CHECKING:
    import httpx

MISSING = "measuring a server needs httpx: pip install 'lockstep-engine[bench]'"
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0
"""A stream that brings nothing for so long has failed."""


@dataclass(slots=True)
class Exchange:
    """One request, from sending to the end of its stream. `piece_s` are the times at which text came.

    All times are seconds since the load began. `error` says what went wrong; None for a whole answer.
    """

    begin_s: float
    piece_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.piece_s[0] - self.begin_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.piece_s)]

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of its model; `vocab_size` is None where it does not say."""

    name: str
    vocab_size: int | None


class LoadGenerator:
    """Sends completions to the server at `url`. Use it as an async context manager.

    Raises ConfigError when httpx is missing or the server cannot be reached.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        try:
            import httpx
        except ImportError:
            raise ConfigError(MISSING) from None
        self._url = url.rstrip("/")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # A proxy between would be measured too.
        )

    async def __aenter__(self) -> LoadGenerator:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._client.aclose()

    async def served_model(self) -> ServedModel:
        """Asks /v1/models, and /model_info for the vocabulary."""
        listed = await self._get("/v1/models")
        if listed is None or not listed.get("data"):
            raise ConfigError(f"{self._url}/v1/models names no model: is this an OpenAI-compatible server?")
        info = await self._get("/model_info") or {}
        return ServedModel(listed["data"][0]["id"], info.get("vocab_size"))

    async def run(
        self,
        model: str,
        jobs: Sequence[Job],
        *,
        concurrency: int | None,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[Exchange]:
        """One exchange per job, in their order.

        With `arrivals_s`, each job is sent at its time, however many are under way; else `concurrency` (None: all)
        are kept under way. Failures are recorded, not raised.
        """
        places = asyncio.Semaphore(concurrency or len(jobs))
        start_s = time.perf_counter()

        async def one(job: Job, arrival_s: float) -> Exchange:
            await asyncio.sleep(start_s + arrival_s - time.perf_counter())
            async with places:
                return await self._exchange(model, job, start_s)

        due_s = arrivals_s if arrivals_s is not None else [0.0] * len(jobs)
        return list(await asyncio.gather(*(one(job, at_s) for job, at_s in zip(jobs, due_s, strict=True))))

    async def _exchange(self, model: str, job: Job, start_s: float) -> Exchange:
        import httpx

        exchange = Exchange(time.perf_counter() - start_s)
        try:
            async with self._client.stream(
                "POST", f"{self._url}/v1/completions", json=_body(model, job)
            ) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    exchange.error = f"status {response.status_code}: {text[:200]}"
                else:
                    await _follow(exchange, _events(response), start_s)
        except httpx.HTTPError as error:
            exchange.error = f"{type(error).__name__}: {error}".rstrip(": ")
        exchange.end_s = time.perf_counter() - start_s
        return exchange

    async def _get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at `path`, None where there is none. Raises ConfigError when nobody answers."""
        import httpx

        try:
            response = await self._client.get(self._url + path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"no server answers at {self._url}: {reason}") from None
        if response.status_code == 401:
            raise ConfigError(f"{self._url} wants an API key: set LOCKSTEP_API_KEY")
        try:
            found = response.json() if response.status_code == 200 else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Seconds at which requests arrive, the first at 0: independent, `rate_per_s` on average."""
    draws = random.Random(f"{seed}/arrivals")
    arrivals = [0.0]
    while len(arrivals) < num_requests:
        arrivals.append(arrivals[-1] + draws.expovariate(rate_per_s))
    return arrivals


def _body(model: str, job: Job) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": job.prompt if isinstance(job.prompt, str) else list(job.prompt),
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of server-sent events. Lines end where bytes say so: texts may hold other ends of lines."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


async def _follow(exchange: Exchange, events: AsyncIterator[str], start_s: float) -> None:
    """Notes times and counts until [DONE]; a stream that ends otherwise is an error."""
    async for data in events:
        if data == "[DONE]":
            return
        now_s = time.perf_counter() - start_s
        try:
            chunk = json.loads(data)
        except ValueError:
            exchange.error = f"an event that is not JSON: {data[:200]}"
            return
        if "error" in chunk:
            exchange.error = f"in the stream: {json.dumps(chunk['error'], ensure_ascii=False)[:200]}"
            return
        if any(choice.get("text") or not choice.get("finish_reason") for choice in chunk.get("choices", ())):
            exchange.piece_s.append(now_s)
        if usage := chunk.get("usage"):
            exchange.num_prompt_tokens = usage["prompt_tokens"]
            exchange.num_output_tokens = usage["completion_tokens"]
    exchange.error = "the stream ended without [DONE]"
