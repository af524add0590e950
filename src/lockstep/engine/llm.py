"""`LLM`: the engine in the caller's process."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from lockstep.config import Decision, EngineConfig, gather
from lockstep.config.components import ENGINE_OPTIONS
from lockstep.core.errors import EngineDead, InvalidRequest, LockstepError
from lockstep.core.output import EngineStats, ModelCard, RequestOutput
from lockstep.core.probe import Probe
from lockstep.core.request import FinishReason, Pooling, Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import TokenLogprob
from lockstep.engine.assembly import Engine
from lockstep.engine.messages import Abort, FlushCache, Rejected, Reply, Submit
from lockstep.engine.output import OutputProcessor
from lockstep.engine.rejection import rejection
from lockstep.executor.memory import MemoryLine
from lockstep.ops.selection import Binding
from lockstep.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. `logprobs` is as long as `token_ids`, or empty when not asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str | int | None
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one prompt, `params.n` of them. `text`, `token_ids` and so on are the first one's."""

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    num_cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs


class LLM:
    """A model, loaded and ready, in this process.

    `model` is a Hugging Face directory, a .gguf file or a Hub id; None is the embedded small model. Keyword options
    are those of the command line (`context_length`, `tp`, `dtype`...); `options` takes them as a mapping.
    `progress` is called with a stage, how much is done and how much there is.

    One step runs at a time; whoever waits for an output runs it, so several threads and tasks may share an LLM.
    Raises ConfigError, ModelFileError, OutOfMemory while it is made.

    >>> with LLM() as llm:
    ...     print(llm.chat([{"role": "user", "content": "Hello!"}]).text)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        probe: Probe | None = None,
        options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        named = {**(options or {}), **keywords}
        given = gather(named if model is None else {**named, "model": model}, allowed=ENGINE_OPTIONS)
        report = (
            (lambda done, total: progress("Loading weights", done, total)) if progress is not None else None
        )
        self._engine = Engine(given, progress=report, probe=probe)
        self.tokenizer: Tokenizer = self._engine.tokenizer
        self._processor = OutputProcessor(self.tokenizer)
        self._commands: deque[Submit | Abort | FlushCache] = deque()
        self._inboxes: dict[str, deque[RequestOutput | LockstepError]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def config(self) -> EngineConfig:
        """Every option, concrete."""
        return self._engine.opened.config

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Who decided each option, and why."""
        return self._engine.opened.decisions

    @property
    def card(self) -> ModelCard:
        """Facts about the model."""
        return self._engine.card

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answers to one prompt or several, as text or token ids, in the prompts' order.

        `params` serves all prompts, or one each. Raises InvalidRequest before anything runs.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if single else prompts
        per_prompt = (
            [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        )
        if len(per_prompt) != len(many):
            raise InvalidRequest(
                f"{len(many)} prompts were given with {len(per_prompt)} params", param="params"
            )
        requests = [self._request(prompt, one) for prompt, one in zip(many, per_prompt, strict=True)]
        return self._complete(requests)

    def chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> Completion:
        """The answer to a conversation. `template` goes to the model's chat template."""
        return self._complete([self._request(self._chat_prompt(messages, template), params)])[0]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling | None = None
    ) -> list[tuple[float, ...]]:
        """Unit vectors of prompts. `pooling` defaults to the model's own; InvalidRequest when it declares none."""
        kind = pooling or self._engine.opened.files.pooling
        if kind is None:
            raise InvalidRequest(
                "this model declares no pooling: say pooling='mean' or 'last'", param="pooling"
            )
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if single else prompts
        vectors = []
        requests = [replace(self._request(prompt, None), pooling=kind) for prompt in many]
        for stream in [self._follow(request) for request in self._submit(requests)]:
            for output in stream:
                if output.deltas and output.deltas[0].error is not None:
                    raise EngineDead(output.deltas[0].error)
                vectors.append(output.embedding or ())
        return vectors

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Outputs of one prompt as they come. Closing the generator ends the request."""
        (request,) = self._submit([self._request(prompt, params)])
        return self._follow(request)

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **template: Any
    ) -> Generator[RequestOutput, None, None]:
        """Outputs of the answer to a conversation, as they come."""
        return self.stream(self._chat_prompt(messages, template), params)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for asyncio: steps run in a thread, so the event loop stays free."""
        (request,) = self._submit([self._request(prompt, params)])
        try:
            while True:
                output = await asyncio.to_thread(self._next, request.request_id)
                yield output
                if output.finished:
                    return
        finally:
            self._forget(request.request_id)

    def stats(self) -> EngineStats:
        """A snapshot of queue, pages and counters."""
        return self._engine.loop.stats()

    def flush_cache(self) -> int:
        """Forgets cached prefixes that no request uses; the number of pages freed."""
        with self._lock:
            _, answers = self._engine.loop.run_once([FlushCache(0)])
        return sum(answer.count for answer in answers if isinstance(answer, Reply))

    def memory_report(self) -> list[MemoryLine]:
        """Where the memory of the first rank goes."""
        return list(self._engine.rank.memory)

    def kernel_report(self) -> list[Binding]:
        """Which kernel serves each call site, and why."""
        return list(self._engine.rank.bindings)

    def close(self) -> None:
        """Ends the workers and releases the model. May be called twice."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chat_prompt(self, messages: Messages, template: Mapping[str, Any]) -> list[int]:
        chat_template = self.tokenizer.chat_template
        if chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; use generate(), or give one: chat_template=FILE"
            )
        # The template writes the special tokens itself.
        return self.tokenizer.encode(chat_template.render(messages, **template), add_special_tokens=False)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        vocab_size = self._engine.opened.facts.vocab_size
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"token id {token_id!r} is not one of 0 to {vocab_size - 1}", param="prompt"
                )
        return Request(
            request_id=f"local-{next(self._numbers)}",
            prompt_token_ids=tuple(token_ids),
            params=params or SamplingParams(),
        )

    def _submit(self, requests: Sequence[Request]) -> Sequence[Request]:
        if self._closed:
            raise EngineDead("this LLM was closed")
        with self._lock:
            for request in requests:
                self._processor.add(request)
                self._inboxes[request.request_id] = deque()
                self._commands.append(Submit(request))
        return requests

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Submits everything before the first step, so that the requests share steps; waits for all."""
        streams = [self._follow(request) for request in self._submit(requests)]
        try:
            return [_collect(request, stream) for request, stream in zip(requests, streams, strict=True)]
        finally:
            for request in requests:
                self._forget(request.request_id)

    def _follow(self, request: Request) -> Generator[RequestOutput, None, None]:
        try:
            while True:
                output = self._next(request.request_id)
                yield output
                if output.finished:
                    return
        finally:
            self._forget(request.request_id)

    def _next(self, request_id: str) -> RequestOutput:
        """The next output of a request; runs steps until there is one."""
        inbox = self._inboxes[request_id]
        while True:
            with self._lock:
                if not inbox:
                    self._pump()
                if inbox:
                    found = inbox.popleft()
                    if isinstance(found, LockstepError):
                        raise found
                    return found

    def _pump(self) -> None:
        """One step of the engine; its news go to the inboxes. The caller holds the lock."""
        commands = list(self._commands)
        self._commands.clear()
        events, answers = self._engine.loop.run_once(commands)
        outputs, to_abort = self._processor.push(events)
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
        for answer in answers:
            if isinstance(answer, Rejected) and answer.request_id in self._inboxes:
                self._processor.drop(answer.request_id)
                self._inboxes[answer.request_id].append(rejection(answer))
        self._commands.extend(Abort(request_id) for request_id in to_abort)

    def _forget(self, request_id: str) -> None:
        """Ends a request that may be unfinished; its pages are freed now."""
        with self._lock:
            if self._inboxes.pop(request_id, None) is None:
                return
            if self._processor.drop(request_id) and not self._closed:
                self._commands.append(Abort(request_id))
            if self._commands and not self._closed and not self._inboxes:
                self._pump()


def _collect(request: Request, outputs: Generator[RequestOutput, None, None]) -> Completion:
    texts: list[list[str]] = [[] for _ in range(request.params.n)]
    token_ids: list[list[int]] = [[] for _ in range(request.params.n)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(request.params.n)]
    endings: list[tuple[FinishReason, str | int | None]] = [("abort", None)] * request.params.n
    prompt_logprobs: list[TokenLogprob] = []
    num_cached_tokens = 0
    for output in outputs:
        prompt_logprobs.extend(output.prompt_logprobs)
        num_cached_tokens = output.num_cached_tokens
        for delta in output.deltas:
            if delta.error is not None:
                raise EngineDead(delta.error)
            texts[delta.index].append(delta.text)
            token_ids[delta.index].extend(delta.token_ids)
            logprobs[delta.index].extend(delta.logprobs)
            if delta.finish_reason is not None:
                endings[delta.index] = (delta.finish_reason, delta.matched_stop)
    choices = tuple(
        Choice("".join(texts[at]), tuple(token_ids[at]), *endings[at], tuple(logprobs[at]))
        for at in range(request.params.n)
    )
    return Completion(request.prompt_token_ids, choices, num_cached_tokens, tuple(prompt_logprobs))
