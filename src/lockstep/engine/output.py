"""From token events to text: detokenising, stop strings, counts. Runs where the client is. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceEvent, TokenLogprob
from lockstep.tokenizer.detokenizer import IncrementalDetokenizer
from lockstep.tokenizer.stops import StopMatcher
from lockstep.tokenizer.tokenizer import Tokenizer


class _Choice:
    """One answer of a request as it grows. What came is kept until it is taken, and only then made into text.

    Stop strings want every token's text at once, so an answer that has some is read token by token all the same.
    """

    __slots__ = (
        "_detokenizer",
        "_error",
        "_index",
        "_logprobs",
        "_matched_stop",
        "_params",
        "_stops",
        "_text",
        "_token_ids",
        "engine_unaware",
        "finish_reason",
        "has_news",
        "num_tokens",
    )

    def __init__(self, index: int, params: SamplingParams, detokenizer: IncrementalDetokenizer) -> None:
        self._index = index
        self._params = params
        self._detokenizer = detokenizer
        self._stops = StopMatcher(params.stop, params.include_stop) if params.stop else None
        self.finish_reason: FinishReason | None = None
        self._matched_stop: str | int | None = None
        self._error: str | None = None
        self.num_tokens = 0
        self.engine_unaware = False
        self._start_anew()

    def _start_anew(self) -> None:
        self.has_news = False
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def add(self, event: SequenceEvent) -> None:
        """Notes what a step found. Nothing is added after the end."""
        self.has_news = True
        token_ids, logprobs = event.token_ids, event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self._matched_stop = event.finish_reason, event.stop_token_id
            self._error = event.error
        if self._stops is not None:
            num_taken = self._read_up_to_stop(self._shown(token_ids), self._stops)
            if num_taken is not None:
                token_ids, logprobs = token_ids[:num_taken], logprobs[:num_taken]
        self.num_tokens += len(token_ids)
        self._token_ids += token_ids
        if logprobs:
            self._logprobs += logprobs

    def take(self) -> CompletionDelta:
        """Everything since the last time."""
        text = self._text
        if self._stops is None:
            text = self._detokenizer.push(self._shown(self._token_ids))
            if self.finish_reason is not None:
                text += self._detokenizer.finish()
        delta = CompletionDelta(
            self._index,
            text,
            tuple(self._token_ids),
            tuple(self._logprobs),
            self.finish_reason,
            self._matched_stop,
            self._error,
        )
        self._start_anew()
        return delta

    def _shown(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Those of the newest tokens whose text is part of the answer: one that ended it is counted, but not shown."""
        ended_by_last = isinstance(self._matched_stop, int) and not self._params.include_stop
        return token_ids[:-1] if ended_by_last else token_ids

    def _read_up_to_stop(self, token_ids: Sequence[int], stops: StopMatcher) -> int | None:
        """Adds the text of the tokens; how many of them a stop string leaves, None where there is none."""
        for number, token_id in enumerate(token_ids, 1):
            piece = self._detokenizer.push([token_id])
            if self.num_tokens + number <= self._params.min_tokens:
                self._text += piece
                continue
            released, stop = stops.push(piece)
            self._text += released
            if stop is not None:
                self.engine_unaware = self.finish_reason is None
                self.finish_reason, self._matched_stop = "stop", stop
                return number
        if self.finish_reason is not None:
            tail, stop = stops.push(self._detokenizer.finish())
            self._text += tail + (stops.finish() if stop is None else "")
        return None


class RequestStream:
    """Collects the events of one request, and gives what came since the last time as one output.

    Once it is `finished`, the client must abort a request whose `engine_unaware` is true: a stop string ended it, and
    the engine does not know. A choice that met a stop string while others go on is generated further and ignored.
    """

    __slots__ = (
        "_choices",
        "_embedding",
        "_num_cached_tokens",
        "_prompt_logprobs",
        "finished",
        "has_news",
        "request",
    )

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        params = request.params
        self._choices = [
            _Choice(index, params, tokenizer.detokenizer(params.skip_special_tokens, request.prompt_token_ids))
            for index in range(params.n)
        ]
        self._num_cached_tokens = 0
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._embedding: tuple[float, ...] | None = None
        self.has_news = False
        self.finished = False

    @property
    def engine_unaware(self) -> bool:
        """True when a stop string ended a choice before the engine did."""
        return any(choice.engine_unaware for choice in self._choices)

    def add(self, event: SequenceEvent) -> None:
        """Notes what a step found for one choice; ignored where the choice has ended."""
        choice = self._choices[event.index]
        if choice.finish_reason is not None:
            return
        if event.num_cached_tokens > self._num_cached_tokens:
            self._num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs:
            self._prompt_logprobs += event.prompt_logprobs
        if event.embedding is not None:
            self._embedding = event.embedding
        if not event.token_ids and event.finish_reason is None:
            # A part of a prompt. What it tells of the prompt goes out with the first token, all of it together.
            return
        choice.add(event)
        self.has_news = True
        if choice.finish_reason is not None:
            self.finished = all(each.finish_reason is not None for each in self._choices)

    def take(self) -> RequestOutput | None:
        """Everything since the last time; None when nothing came."""
        if not self.has_news:
            return None
        output = RequestOutput(
            request_id=self.request.request_id,
            deltas=tuple([choice.take() for choice in self._choices if choice.has_news]),
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=sum([choice.num_tokens for choice in self._choices]),
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            embedding=self._embedding,
        )
        self.has_news = False
        self._prompt_logprobs, self._embedding = (), None
        return output


class OutputProcessor:
    """The streams of all unfinished requests of a client that is given each step's outputs at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, RequestStream] = {}
        self._silent: set[str] = set()

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, request: Request, *, at_once: bool = False) -> None:
        """Follow a request that is about to be submitted; `at_once`: one output, when it has ended."""
        self._streams[request.request_id] = RequestStream(request, self._tokenizer)
        if at_once:
            self._silent.add(request.request_id)

    def drop(self, request_id: str) -> bool:
        """Forget a request; False when it is unknown."""
        self._silent.discard(request_id)
        return self._streams.pop(request_id, None) is not None

    def push(self, events: Sequence[SequenceEvent]) -> tuple[list[RequestOutput], list[str]]:
        """Outputs by request, and the requests that the engine must be told to end. Unknown requests are ignored."""
        touched: dict[str, RequestStream] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            stream.add(event)
            if stream.finished or event.request_id not in self._silent:
                touched[event.request_id] = stream
        outputs, to_abort = [], []
        for request_id, stream in touched.items():
            output = stream.take()
            if output is not None:
                outputs.append(output)
            if stream.finished:
                self.drop(request_id)
                if stream.engine_unaware:
                    to_abort.append(request_id)
        return outputs, to_abort
