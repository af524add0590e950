"""An engine client that answers from a script, one byte a token, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import llguidance

from lockstep.core.errors import EngineDead, InvalidRequest, QueueFull
from lockstep.core.output import CompletionDelta, EngineStats, ModelCard, RequestOutput
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import Grammar
from lockstep.core.step import TokenLogprob
from lockstep.tokenizer.chat_template import ChatTemplate

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257}
VOCAB_SIZE = 258
CONTEXT_LENGTH = 4096

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call>{% endif %}" + CHATML


class ByteTokenizer:
    """Ids 0 to 255 are bytes; two special tokens follow."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (257,)
    special_token_ids = frozenset(SPECIAL.values())

    def __init__(self, template: str | None = CHATML) -> None:
        self.chat_template = ChatTemplate(template, {}) if template is not None else None

    def require_text(self, what: str) -> None:
        """There is text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        while text:
            name = next((name for name in SPECIAL if text.startswith(name)), None)
            if name:
                ids.append(SPECIAL[name])
                text = text[len(name) :]
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.special_token_ids)]
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        names = {number: name for name, number in SPECIAL.items()}
        return names[token_id].encode() if token_id in names else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def logprob_of(token_id: int) -> float:
    """A made-up log-probability that a test can compute again."""
    return -(token_id + 1) / 64


def entry(token_id: int, num_top: int) -> TokenLogprob:
    """The token as the likeliest, its successors in the vocabulary behind it."""
    top = tuple(((token_id + k) % 256, logprob_of(token_id) - k) for k in range(num_top))
    return TokenLogprob(token_id, logprob_of(token_id), top)


@dataclass
class FakeClient:
    """`answer` gives the text of choice `index`; `delay_s` passes before each token."""

    answer: Callable[[Request, int], str] = lambda request, index: "Hello, world."
    delay_s: float = 0.0
    die_after: int | None = None
    fail_with: str | None = None
    is_full: bool = False
    pooling: str | None = None
    template: str | None = CHATML
    name: str = "tiny"
    is_alive: bool = True
    is_responsive: bool = True
    max_queued_requests: int = 1024
    started: bool = False
    closed: bool = False
    requests: list[Request] = field(default_factory=list)
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    closed_early: list[str] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = ByteTokenizer(self.template)
        self.card = ModelCard(
            name=self.name,
            path="/models/tiny",
            architecture="llama",
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            dtype="float32",
            quantization="none",
            pooling=self.pooling,
            num_parameters=1000,
            eos_token_ids=(257,),
        )

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True
        await self.abort_all()

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        if not self.is_alive or self.closed:
            raise EngineDead("the engine stopped; try again")
        if self.is_full or len(self.running) >= self.max_queued_requests:
            raise QueueFull("the queue is full (2 requests wait)", retry_after_s=1.5)
        self.requests.append(request)
        self.running[request.request_id] = asyncio.Event()
        finished = False
        try:
            async for output in self._outputs(request):
                finished = output.finished
                yield output
        finally:
            del self.running[request.request_id]
            if not finished:
                self.closed_early.append(request.request_id)

    async def _outputs(self, request: Request) -> AsyncIterator[RequestOutput]:
        if request.pooling:
            total = float(sum(request.prompt_token_ids))
            yield self._output(request, (), 0, finished=True, embedding=(total, 0.5, -1.0))
            return
        params = request.params
        texts = [self.answer(request, index).encode() for index in range(params.n)]
        limit = params.max_tokens if params.max_tokens is not None else CONTEXT_LENGTH
        if params.prompt_logprobs is not None:
            found = tuple(entry(i, params.prompt_logprobs) for i in request.prompt_token_ids[1:])
            half = len(found) // 2  # as from two chunks of a long prompt
            yield self._output(request, (), 0, prompt_logprobs=found[:half])
            yield self._output(request, (), 0, prompt_logprobs=found[half:])
        num_output = 0
        for position in range(max(map(len, texts))):
            if self.delay_s:
                try:
                    await asyncio.wait_for(self.running[request.request_id].wait(), self.delay_s)
                except asyncio.TimeoutError:
                    pass
            if self.closed:
                raise EngineDead("the server is shutting down; the request was not completed")
            if self.running[request.request_id].is_set():
                ended = tuple(CompletionDelta(index, finish_reason="abort") for index in range(params.n))
                yield self._output(request, ended, num_output, finished=True)
                return
            if self.die_after is not None and num_output >= self.die_after:
                raise EngineDead("the engine died; it is being started again")
            deltas = [
                self._delta(request, i, t, position, limit)
                for i, t in enumerate(texts)
                if position < min(len(t), limit)
            ]
            num_output += len(deltas)
            self.num_tokens += len(deltas)
            done = position + 1 >= min(max(map(len, texts)), limit)
            yield self._output(request, tuple(deltas), num_output, finished=done)
            if done:
                return
            await asyncio.sleep(0)

    def _delta(self, request: Request, index: int, text: bytes, position: int, limit: int) -> CompletionDelta:
        token_id = text[position]
        reason: FinishReason | None = None
        if position + 1 == min(len(text), limit):
            reason = "stop" if position + 1 == len(text) else "length"
        if self.fail_with is not None:
            return CompletionDelta(index, finish_reason="error", error=self.fail_with)
        wanted = request.params.logprobs
        return CompletionDelta(
            index,
            text=bytes([token_id]).decode("latin-1"),
            token_ids=(token_id,),
            logprobs=() if wanted is None else (entry(token_id, wanted),),
            finish_reason=reason,
        )

    def _output(
        self,
        request: Request,
        deltas: tuple[CompletionDelta, ...],
        num_output: int,
        *,
        finished: bool = False,
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
        embedding: tuple[float, ...] | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            request.request_id,
            deltas,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=4,
            num_output_tokens=num_output,
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            embedding=embedding,
        )

    async def abort(self, request_id: str) -> bool:
        found = self.running.get(request_id)
        if found is not None:
            found.set()
        return found is not None

    async def abort_all(self) -> int:
        for event in self.running.values():
            event.set()
        return len(self.running)

    async def flush_cache(self) -> int:
        return 7

    async def stats(self) -> EngineStats:
        if not self.is_alive:
            raise EngineDead("the engine stopped; try again")
        return EngineStats(
            num_running=len(self.running),
            num_pages_total=100,
            num_pages_in_use=25,
            num_pages_cached=10,
            page_size=16,
            num_prompt_tokens=400,
            num_cached_tokens=100,
            num_output_tokens=self.num_tokens,
            num_preemptions=3,
            uptime_s=12.5,
        )

    def validate_grammar(self, grammar: Grammar) -> None:
        matcher = llguidance.LLMatcher
        build = {
            "json_schema": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "ebnf": matcher.grammar_from_lark,
        }.get(grammar.kind)
        if build is None:
            return
        try:
            message = matcher.validate_grammar(build(grammar.source))
        except ValueError as error:
            message = str(error)
        if message:
            raise InvalidRequest(
                f"the grammar is broken: {message}", param=grammar.kind, code="invalid_grammar"
            )
