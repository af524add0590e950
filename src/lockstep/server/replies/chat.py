"""Chat completions, whole and as a stream. Both are made of the same changes, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.step import TokenLogprob
from lockstep.server.conversion import new_id
from lockstep.server.logprobs import chat_entry, prompt_entries
from lockstep.server.replies.common import Usage, created_s
from lockstep.server.tools.reader import AnswerReader, CallArguments, CallStart, Piece, Text
from lockstep.tokenizer.tokenizer import Tokenizer


@dataclass
class _Choice:
    """One answer while it grows."""

    reader: AnswerReader
    has_begun: bool = False
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    pending_logprobs: list[dict[str, Any]] = field(default_factory=list)
    all_logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def changes(self, delta: CompletionDelta) -> Iterator[dict[str, Any]]:
        """The `delta` objects that this output adds; the first one carries the role."""
        if not self.has_begun:
            self.has_begun = True
            yield {"role": "assistant", "content": ""}
        yield from map(self._change, self.reader.feed(delta.text))
        if delta.finish_reason is not None:
            yield from map(self._change, self.reader.finish())
            ended_well = delta.finish_reason == "stop" and self.calls
            self.finish_reason = "tool_calls" if ended_well else delta.finish_reason

    def _change(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Text):
            self.content += piece.text
            return {"content": piece.text}
        if isinstance(piece, CallStart):
            head = {"id": new_id("call"), "type": "function"}
            self.calls.append(head | {"function": {"name": piece.name, "arguments": ""}})
            function = {"name": piece.name, "arguments": ""}
            return {"tool_calls": [{"index": len(self.calls) - 1, **head, "function": function}]}
        assert isinstance(piece, CallArguments)
        self.calls[-1]["function"]["arguments"] += piece.text
        return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": piece.text}}]}

    def message(self) -> dict[str, Any]:
        """The finished message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None, "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        else:
            message["content"] = self.content
        return message


class ChatReply:
    """Builds the answer to one chat completion request."""

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        make_reader: Callable[[], AnswerReader],
        *,
        num_choices: int,
        wants_logprobs: bool,
        wants_prompt_logprobs: bool,
        wants_usage: bool,
    ) -> None:
        self._head = {"id": request_id, "created": created_s(), "model": model}
        self._tokenizer = tokenizer
        self._choices = [_Choice(make_reader()) for _ in range(num_choices)]
        self._wants_logprobs = wants_logprobs
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._wants_usage = wants_usage
        self._prompt_logprobs: list[TokenLogprob] = []
        self._usage = Usage()

    def chunks(self, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks that one output of the engine becomes."""
        self._usage.note(0, output)
        self._prompt_logprobs += output.prompt_logprobs
        return [chunk for delta in output.deltas for chunk in self._choice_chunks(delta)]

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk of token counts, if it was asked for."""
        if not self._wants_usage:
            return None
        return self._chunk([]) | {"usage": self._usage.as_openai()}

    def body(self) -> dict[str, Any]:
        """The whole answer, after `chunks` has seen every output."""
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.all_logprobs, "refusal": None} if self._wants_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        body = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage.as_openai()}
        return body | self._prompt_extension()

    def _choice_chunks(self, delta: CompletionDelta) -> Iterator[dict[str, Any]]:
        choice = self._choices[delta.index]
        if self._wants_logprobs:
            entries = [chat_entry(self._tokenizer, found) for found in delta.logprobs]
            choice.all_logprobs += entries
            choice.pending_logprobs += entries
        changes = list(choice.changes(delta))
        if delta.finish_reason is not None:
            changes.append({})
        for position, change in enumerate(changes):
            is_first, is_last = "role" in change, position == len(changes) - 1
            logprobs = None if is_first else self._taken_logprobs(choice)
            finish_reason = choice.finish_reason if is_last else None
            chunk = self._chunk([_choice_chunk(delta.index, change, logprobs, finish_reason)])
            yield chunk | (self._prompt_extension() if is_first and delta.index == 0 else {})

    def _taken_logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        """Log-probabilities not yet sent: a reader may hold text back longer than its tokens."""
        if not choice.pending_logprobs:
            return None
        taken, choice.pending_logprobs = choice.pending_logprobs, []
        return {"content": taken, "refusal": None}

    def _prompt_extension(self) -> dict[str, Any]:
        if not self._wants_prompt_logprobs:
            return {}
        return {"prompt_logprobs": prompt_entries(self._tokenizer, self._prompt_logprobs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._wants_usage:
            chunk["usage"] = None
        return chunk


def _choice_chunk(
    index: int, change: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": change, "logprobs": logprobs, "finish_reason": finish_reason}
