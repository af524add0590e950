"""`LLM`: the engine in the caller's process."""

from __future__ import annotations

import asyncio
import itertools
import math
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, get_args

from lockstep.config import Decision, EngineConfig, gather
from lockstep.config.components import ENGINE_OPTIONS
from lockstep.core.errors import EngineDead, InvalidRequest, LockstepError, nearest
from lockstep.core.garbage import leave_alone_while
from lockstep.core.output import EngineStats, ModelCard, RequestOutput
from lockstep.core.probe import Probe
from lockstep.core.request import FinishReason, Pooling, Request
from lockstep.core.sampling import SamplingParams, as_integer
from lockstep.core.step import TokenLogprob
from lockstep.engine.assembly import Engine
from lockstep.engine.messages import Abort, FlushCache, Rejected, Reply, Submit
from lockstep.engine.model_files import read_ahead_weights
from lockstep.engine.output import OutputProcessor
from lockstep.engine.rejection import rejection
from lockstep.engine.turn_lock import TurnLock
from lockstep.executor.memory import MemoryLine
from lockstep.features.grammar import GrammarCompiler
from lockstep.ops.selection import Binding
from lockstep.scheduler.intake import validate
from lockstep.tokenizer.conversation import checked_messages
from lockstep.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
_T = TypeVar("_T")
_Outputs = Generator[RequestOutput, None, None]


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
    Raises ConfigError, ModelFileError, OutOfMemory while it is made. Afterwards InvalidRequest for what can never
    run, LockstepError when a request fails on its way, EngineDead when the engine itself does.

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
        read_ahead_weights(given)
        report = (
            (lambda done, total: progress("Loading weights", done, total)) if progress is not None else None
        )
        self._engine = Engine(given, progress=report, probe=probe)
        # An LLM that nobody closed ends its workers before the interpreter goes: torch's collectives let go of tensors
        # in threads of their own, which must not happen after that.
        weakref.finalize(self, self._engine.close)
        self.tokenizer: Tokenizer = self._engine.tokenizer
        self._grammars = GrammarCompiler(self.tokenizer)
        self._processor = OutputProcessor(self.tokenizer)
        self._commands: deque[Submit | Abort | FlushCache] = deque()
        self._inboxes: dict[str, deque[RequestOutput | LockstepError]] = {}
        self._numbers = itertools.count()
        self._lock = TurnLock()
        self._closed = False
        self._broken: str | None = None
        self._collect_again = leave_alone_while(self)

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

        Ids may be arrays or tensors of integers. `params` serves all prompts, or one each. Raises InvalidRequest
        before anything runs.
        """
        many = _as_list(prompts)
        per_prompt = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(per_prompt) != len(many):
            raise InvalidRequest(
                f"{len(many)} prompts were given with {len(per_prompt)} params", param="params"
            )
        requests = [self._request(prompt, one) for prompt, one in zip(many, per_prompt, strict=True)]
        return self._complete(requests, _collect)

    def chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> Completion:
        """The answer to a conversation: messages with `role` and `content`. `template` goes to the chat template."""
        return self._complete([self._request(self._chat_prompt(messages, template), params)], _collect)[0]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling | None = None
    ) -> list[tuple[float, ...]]:
        """Unit vectors of prompts. `pooling` defaults to the model's own; InvalidRequest when it declares none."""
        kinds = get_args(Pooling)
        if pooling is not None and pooling not in kinds:
            hint = nearest(str(pooling), kinds)
            raise InvalidRequest(
                f"pooling is one of {', '.join(kinds)}, not {pooling!r}{hint}", param="pooling"
            )
        kind = pooling or self._engine.opened.files.pooling
        if kind is None:
            raise InvalidRequest(
                "this model declares no pooling: say pooling='mean' or 'last'", param="pooling"
            )
        return self._complete([self._request(prompt, None, kind) for prompt in _as_list(prompts)], _vector)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> _Outputs:
        """Outputs of one prompt as they come, from the first that is taken. Closing the generator ends the request."""
        return self._stream(self._request(prompt, params))

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **template: Any
    ) -> _Outputs:
        """Outputs of the answer to a conversation, as they come."""
        return self.stream(self._chat_prompt(messages, template), params)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for asyncio: steps run in a thread, so the event loop stays free."""
        request = self._request(prompt, params)
        self._submit([request])
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
            return sum(reply.count for reply in self._step([FlushCache(0)]))

    def memory_report(self, *, measure: bool = False) -> list[MemoryLine]:
        """Where the memory of the first rank goes. With `measure`, the largest steps are run if they were not yet."""
        with self._lock:
            return list(self._engine.rank.memory_lines(measure=measure))

    @property
    def native_kernels(self) -> str | None:
        """Which native kernels serve the model, or on a device for them why there are none; None where others serve."""
        return self._engine.native_kernels

    def kernel_report(self) -> list[Binding]:
        """Which kernel serves each call site, and why."""
        return list(self._engine.rank.bindings)

    def close(self) -> None:
        """Ends the workers and releases the model. May be called twice."""
        self._closed = True
        self._engine.close()
        self._collect_again()

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
                "this model has no chat template; use generate(), or give one: chat_template=FILE",
                param="messages",
                code="no_chat_template",
            )
        # The template writes the special tokens itself.
        text = chat_template.render(checked_messages(messages), **template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _request(
        self, prompt: Prompt, params: SamplingParams | None, pooling: Pooling | None = None
    ) -> Request:
        """A request that this engine can run. Raises InvalidRequest naming the field."""
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is a SamplingParams, not {params!r}", param="params")
        request = Request(
            request_id=f"local-{next(self._numbers)}",
            prompt_token_ids=self._prompt_ids(prompt),
            params=params or SamplingParams(),
            pooling=pooling,
        )
        for token_id in request.params.logit_bias:
            self._token_id(token_id, "logit_bias")
        if request.params.stop:
            self.tokenizer.require_text("a stop string")
        if request.params.grammar is not None:
            self._grammars.validate(request.params.grammar)
        validate(request, self._engine.loop.core.scheduler.limits)
        return request

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        # A tokenizer may have more ids than the model has embeddings, so those of a text are looked at, too.
        items = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _items(prompt)
        vocab_size = self.card.vocab_size
        # Prompts are long: plain numbers in range are taken as they are.
        if set(map(type, items)) <= {int} and (not items or (min(items) >= 0 and max(items) < vocab_size)):
            return tuple(items)
        return tuple(self._token_id(each, "prompt") for each in items)

    def _token_id(self, given: Any, param: str) -> int:
        token_id, vocab_size = as_integer(given), self.card.vocab_size
        if token_id is None or not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"token id {given!r} is not one of 0 to {vocab_size - 1}", param=param)
        return token_id

    def _submit(self, requests: Sequence[Request], *, at_once: bool = False) -> None:
        with self._lock:
            self._require_alive()
            for request in requests:
                self._processor.add(request, at_once=at_once)
                self._inboxes[request.request_id] = deque()
                self._commands.append(Submit(request))

    def _complete(self, requests: Sequence[Request], collect: Callable[[Request, _Outputs], _T]) -> list[_T]:
        """Submits everything before the first step, so that the requests share steps; waits for all."""
        self._submit(requests, at_once=True)
        try:
            return [collect(request, self._follow(request)) for request in requests]
        finally:
            for request in requests:
                self._forget(request.request_id)

    def _stream(self, request: Request) -> _Outputs:
        self._submit([request])
        yield from self._follow(request)

    def _follow(self, request: Request) -> _Outputs:
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
        while True:
            with self._lock:
                inbox = self._inboxes.get(request_id)
                if inbox is None:
                    raise EngineDead("nobody waits for this request any more")
                if not inbox:
                    self._step(self._take_commands())
                if inbox:
                    found = inbox.popleft()
                    if isinstance(found, LockstepError):
                        raise found
                    return found

    def _take_commands(self) -> list[Submit | Abort | FlushCache]:
        """Commands in order, up to the first request for which the queue has no room yet.

        Of many requests no more than two steps can begin, unless their order is another: taking them in takes the host
        as long as small steps take a device, which can compute the first ones meanwhile.
        """
        scheduler = self._engine.loop.core.scheduler
        limits = scheduler.limits
        room = limits.max_queued_requests - scheduler.num_waiting
        tokens_left = 2 * limits.chunk_tokens if limits.policy == "fcfs" else math.inf
        taken: list[Submit | Abort | FlushCache] = []
        while self._commands:
            command = self._commands[0]
            if isinstance(command, Submit):
                if room <= 0 or tokens_left <= 0:
                    break
                room -= 1
                tokens_left -= len(command.request.prompt_token_ids)
            taken.append(self._commands.popleft())
        return taken

    def _step(self, commands: Sequence[Submit | Abort | FlushCache]) -> list[Reply]:
        """One step of the engine; its news go to the inboxes. The caller holds the lock."""
        self._require_alive()
        try:
            events, answers = self._engine.loop.run_once(commands)
        except BaseException as error:
            # Half a step leaves ranks, pages and sequences in no state to go on from.
            self._broken = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # A collective that breaks is the symptom; a worker that died is the cause to tell.
            self._engine.check(patience_s=1.0)
            raise
        outputs, to_abort = self._processor.push(events)
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
        for answer in answers:
            if isinstance(answer, Rejected) and answer.request_id in self._inboxes:
                self._processor.drop(answer.request_id)
                self._inboxes[answer.request_id].append(rejection(answer))
        self._commands.extendleft(Abort(request_id) for request_id in to_abort)
        return [answer for answer in answers if isinstance(answer, Reply)]

    def _forget(self, request_id: str) -> None:
        """Ends a request that may be unfinished; its pages are freed now."""
        with self._lock:
            if self._inboxes.pop(request_id, None) is None:
                return
            if self._processor.drop(request_id):
                self._withdraw(request_id)
            if self._commands and not self._inboxes and not self._closed and self._broken is None:
                self._step(self._take_commands())

    def _withdraw(self, request_id: str) -> None:
        """Takes an unfinished request back from the queue, or else from the engine: before others begin."""
        for command in self._commands:
            if isinstance(command, Submit) and command.request.request_id == request_id:
                self._commands.remove(command)
                return
        self._commands.appendleft(Abort(request_id))

    def _require_alive(self) -> None:
        if self._closed:
            raise EngineDead("this LLM was closed")
        if self._broken is not None:
            raise EngineDead(f"this LLM ended in the middle of a step ({self._broken}); make a new one")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """The prompts, whether one was given or several. Raises InvalidRequest for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    return [items] if items and as_integer(items[0]) is not None else items


def _items(given: Any) -> list[Any]:
    """What is in a list, an array or a tensor; numbers, None and tensors of no dimension hold nothing to go through."""
    try:
        return list(given)
    except TypeError:
        raise InvalidRequest(f"a prompt is text or token ids, not {given!r}", param="prompt") from None


def _vector(request: Request, outputs: _Outputs) -> tuple[float, ...]:
    """The embedding that a request asked for."""
    (output,) = outputs
    _require_success(output)
    assert output.embedding is not None
    return output.embedding


def _require_success(output: RequestOutput) -> None:
    """Raises LockstepError when a choice failed while it ran; the engine goes on."""
    for delta in output.deltas:
        if delta.error is not None:
            raise LockstepError(f"generation failed: {delta.error}")


def _collect(request: Request, outputs: _Outputs) -> Completion:
    texts: list[list[str]] = [[] for _ in range(request.params.n)]
    token_ids: list[list[int]] = [[] for _ in range(request.params.n)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(request.params.n)]
    endings: list[tuple[FinishReason, str | int | None]] = [("abort", None)] * request.params.n
    prompt_logprobs: list[TokenLogprob] = []
    num_cached_tokens = 0
    for output in outputs:
        prompt_logprobs.extend(output.prompt_logprobs)
        num_cached_tokens = output.num_cached_tokens
        _require_success(output)
        for delta in output.deltas:
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
