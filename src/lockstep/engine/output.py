"""From token events to text: detokenising, stop strings, counts. Runs where the client is. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.request import Request
from lockstep.core.step import SequenceEvent, TokenLogprob
from lockstep.tokenizer.detokenizer import IncrementalDetokenizer
from lockstep.tokenizer.stops import StopMatcher
from lockstep.tokenizer.tokenizer import Tokenizer


@dataclass
class _Choice:
    """One answer of a request as it grows."""

    detokenizer: IncrementalDetokenizer
    stops: StopMatcher
    num_tokens: int = 0
    finished: bool = False


class RequestStream:
    """Turns the events of one request into outputs.

    `matched_stop` in an output means that the engine does not know yet: once `finished`, the client must abort a
    request whose `engine_unaware` is true. A choice that met a stop string while others go on is generated
    further and ignored. With `at_once` there is one output, when every choice has ended: nobody looks before. Stop
    strings want every token's text at once, so such requests are followed step by step all the same.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, *, at_once: bool = False) -> None:
        self.request = request
        params = request.params
        self._held: list[SequenceEvent] | None = [] if at_once and not params.stop else None
        self._num_open = params.n
        self._choices = [
            _Choice(
                tokenizer.detokenizer(params.skip_special_tokens, request.prompt_token_ids),
                StopMatcher(params.stop, params.include_stop),
            )
            for _ in range(params.n)
        ]
        self._num_cached_tokens = 0
        self.engine_unaware = False

    @property
    def finished(self) -> bool:
        """True once every choice has its finish reason."""
        return all(choice.finished for choice in self._choices)

    def push(self, events: Sequence[SequenceEvent]) -> RequestOutput | None:
        """What the events mean for the client; None when all of it is held back or belongs to ended choices."""
        if self._held is not None:
            self._held += events
            self._num_open -= sum(event.finish_reason is not None for event in events)
            if self._num_open > 0:
                return None
            events = _merged(self._held)
        deltas = []
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        embedding = None
        for event in events:
            choice = self._choices[event.index]
            if choice.finished:
                continue
            prompt_logprobs += event.prompt_logprobs
            embedding = event.embedding or embedding
            self._num_cached_tokens = max(self._num_cached_tokens, event.num_cached_tokens)
            deltas.append(self._advance(choice, event))
        if not deltas:
            return None
        return RequestOutput(
            request_id=self.request.request_id,
            deltas=tuple(deltas),
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=sum(choice.num_tokens for choice in self._choices),
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            embedding=embedding,
        )

    def _advance(self, choice: _Choice, event: SequenceEvent) -> CompletionDelta:
        params = self.request.params
        text, taken = "", 0
        stop: str | None = None
        shown = event.token_ids
        if event.stop_token_id is not None and not params.include_stop:
            # The token that ended the answer is counted, but its text is not part of it.
            shown = event.token_ids[:-1]
        if not params.stop:
            text = choice.detokenizer.push(shown)
            shown = ()
        for token_id in shown:
            taken += 1
            choice.num_tokens += 1
            piece = choice.detokenizer.push([token_id])
            if choice.num_tokens <= params.min_tokens:
                text += piece
                continue
            released, stop = choice.stops.push(piece)
            text += released
            if stop is not None:
                break
        reason = event.finish_reason
        matched: str | int | None = event.stop_token_id
        if stop is not None:
            self.engine_unaware = reason is None or self.engine_unaware
            reason, matched = "stop", stop
        else:
            choice.num_tokens += len(event.token_ids) - taken
            taken = len(event.token_ids)
            if reason is not None:
                tail, stop = choice.stops.push(choice.detokenizer.finish())
                text += tail + (choice.stops.finish() if stop is None else "")
        choice.finished = reason is not None
        return CompletionDelta(
            index=event.index,
            text=text,
            token_ids=event.token_ids[:taken],
            logprobs=event.logprobs[:taken],
            finish_reason=reason,
            matched_stop=matched,
            error=event.error,
        )


def _merged(events: Sequence[SequenceEvent]) -> list[SequenceEvent]:
    """One event for each choice, as if all of its steps had been one."""
    by_choice: dict[int, list[SequenceEvent]] = {}
    for event in events:
        by_choice.setdefault(event.index, []).append(event)
    return [
        replace(
            own[-1],
            token_ids=tuple(chain.from_iterable(event.token_ids for event in own)),
            logprobs=tuple(chain.from_iterable(event.logprobs for event in own)),
            prompt_logprobs=tuple(chain.from_iterable(event.prompt_logprobs for event in own)),
            num_cached_tokens=max(event.num_cached_tokens for event in own),
        )
        for own in by_choice.values()
    ]


class OutputProcessor:
    """The streams of all unfinished requests of a client."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, RequestStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def add(self, request: Request, *, at_once: bool = False) -> None:
        """Follow a request that is about to be submitted; `at_once`: one output, when it has ended."""
        self._streams[request.request_id] = RequestStream(request, self._tokenizer, at_once=at_once)

    def drop(self, request_id: str) -> bool:
        """Forget a request; False when it is unknown."""
        return self._streams.pop(request_id, None) is not None

    def request_ids(self) -> list[str]:
        """Unfinished requests, oldest first."""
        return list(self._streams)

    def push(self, events: Sequence[SequenceEvent]) -> tuple[list[RequestOutput], list[str]]:
        """Outputs by request, and the requests that the engine must be told to end. Unknown requests are ignored."""
        by_request: dict[str, list[SequenceEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        outputs, to_abort = [], []
        for request_id, news in by_request.items():
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            output = stream.push(news)
            if output is not None:
                outputs.append(output)
            if stream.finished:
                del self._streams[request_id]
                if stream.engine_unaware:
                    to_abort.append(request_id)
        return outputs, to_abort
