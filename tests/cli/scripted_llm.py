"""A stand-in for the engine behind the command line: answers with scripted words, one token each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from lockstep.core.errors import InvalidRequest, LockstepError
from lockstep.core.output import CompletionDelta, ModelCard, RequestOutput
from lockstep.core.sampling import SamplingParams

CARD = ModelCard(
    name="scripted",
    path="scripted.gguf",
    architecture="LlamaForCausalLM",
    context_length=64,
    vocab_size=100,
    dtype="float32",
    quantization="none",
    pooling=None,
    num_parameters=1,
    eos_token_ids=(0,),
)


class ScriptedLLM:
    """Says `words`; remembers what it was asked. `on_token` is called before each output."""

    words: Sequence[str] = ("Pa", "ris", ".")
    failure: LockstepError | None = None
    opening_failure: LockstepError | None = None
    on_token: Callable[[int], None] | None = None
    native_kernels: str | None = "native kernels: scripted"
    chat_template: str | None = "{{ messages }}"
    room = 10_000

    def __init__(
        self,
        model: Any = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        options: Any = None,
        **keywords: Any,
    ) -> None:
        if type(self).opening_failure is not None:
            raise type(self).opening_failure
        named = {**(options or {}), **keywords}
        self.options = {**named, "model": model} if model is not None else named
        self.card = CARD
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.tokenizer = SimpleNamespace(chat_template=type(self).chat_template)
        self.closed = False
        self.ended_early = 0
        if progress is not None:
            progress("loading weights", 1, 2)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        if (params.max_tokens or 0) > self.room:
            raise InvalidRequest(f"max_tokens {params.max_tokens} does not fit", param="max_tokens")
        return self._answer(prompt, params)

    def _answer(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        self.asked.append((prompt, params))
        finished = False
        try:
            for count, word in enumerate(self.words, start=1):
                if self.on_token is not None:
                    self.on_token(count)
                finished = count == len(self.words)
                yield self._output(count, word, finished)
            if self.failure is not None:
                raise self.failure
        finally:
            self.ended_early += not finished

    def stream_chat(self, messages: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        if len(messages) > 6:
            raise InvalidRequest("the prompt is longer than the context (64 tokens)")
        return self.stream(list(messages), params)

    def _output(self, count: int, word: str, finished: bool) -> RequestOutput:
        delta = CompletionDelta(0, word, (count + 10,), finish_reason="stop" if finished else None)
        return RequestOutput("r0", (delta,), 7, 4, count, finished)

    def close(self) -> None:
        self.closed = True
