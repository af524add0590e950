"""Lockstep as a contender: the engine of `LLM`, in this process, stepped here so that every step can be timed."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.bench.contender import Round
from lockstep.bench.workload import Job
from lockstep.config import gather
from lockstep.config.components import ENGINE_OPTIONS
from lockstep.core.errors import ConfigError, EngineDead, InvalidRequest
from lockstep.core.output import RequestOutput
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.assembly import Engine
from lockstep.engine.messages import FlushCache, Rejected, Submit
from lockstep.engine.output import OutputProcessor
from lockstep.engine.rejection import rejection


class LockstepContender:
    """`options` are those of LLM, and so are the errors."""

    name = "lockstep"
    caches_prefixes = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._engine = Engine(gather(options, allowed=ENGINE_OPTIONS))
        self._numbers = itertools.count()
        self.card = self._engine.card

    def run(self, jobs: Sequence[Job], *, fresh: bool = True) -> Round:
        """All jobs are queued before the first step. Tokens are made into text, as for any reader."""
        requests = {request.request_id: request for request in map(self._request, jobs)}
        processor = OutputProcessor(self._engine.tokenizer)
        for request in requests.values():
            processor.add(request)
        loop = self._engine.loop
        if fresh:
            loop.run_once([FlushCache(0)])
        before = loop.stats()
        waiting = deque(requests.values())
        trace: list[tuple[float, int]] = []
        first: dict[str, tuple[float, int]] = {}
        num_cached_tokens = num_output_tokens = 0
        begin_s = time.perf_counter()
        while len(processor):
            events, answers = loop.run_once(self._submissions(waiting))
            outputs, _ = processor.push(events)
            now_s = time.perf_counter() - begin_s
            for answer in answers:
                if isinstance(answer, Rejected):
                    raise rejection(answer)
            for output in outputs:
                delta = output.deltas[0]
                if delta.error is not None:
                    raise EngineDead(delta.error)
                num_output_tokens += len(delta.token_ids)
                first.setdefault(output.request_id, (now_s, delta.token_ids[0]))
                if output.finished:
                    _require_whole(output, requests[output.request_id])
                    num_cached_tokens += output.num_cached_tokens
            if outputs:
                trace.append((now_s, num_output_tokens))
        after = loop.stats()
        return Round(
            num_prompt_tokens=sum(len(request.prompt_token_ids) for request in requests.values()),
            num_cached_tokens=num_cached_tokens,
            num_output_tokens=num_output_tokens,
            num_steps=after.num_steps - before.num_steps,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            seconds=trace[-1][0],
            trace=tuple(trace),
            first_token_s=tuple(first[request_id][0] for request_id in requests),
            first_token_ids=tuple(first[request_id][1] for request_id in requests),
        )

    def close(self) -> None:
        self._engine.close()

    def _request(self, job: Job) -> Request:
        token_ids = self._engine.tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt
        largest = self.card.vocab_size - 1
        if max(token_ids, default=0) > largest:
            raise InvalidRequest(f"token id {max(token_ids)} is not one of 0 to {largest}", param="prompt")
        return Request(
            request_id=f"job-{next(self._numbers)}",
            prompt_token_ids=tuple(token_ids),
            params=SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True),
        )

    def _submissions(self, waiting: deque[Request]) -> list[Submit]:
        """As many of the waiting requests as the engine's queue has room for."""
        if not waiting:
            return []
        room = self._engine.opened.config.scheduler.max_queued_requests - self._engine.loop.stats().num_waiting
        return [Submit(waiting.popleft()) for _ in range(min(room, len(waiting)))]


def _require_whole(output: RequestOutput, request: Request) -> None:
    """Raises ConfigError for an answer that found no room."""
    wanted = request.params.max_tokens
    if output.num_output_tokens != wanted:
        raise ConfigError(
            f"an answer ended after {output.num_output_tokens} of {wanted} tokens: the context or the KV pool is too "
            "small; ask for fewer tokens, or raise --context-length or --max-total-tokens"
        )
