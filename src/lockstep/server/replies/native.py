"""Answers of /generate. As in SGLang, each event of a stream repeats the whole text so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.step import TokenLogprob
from lockstep.server.logprobs import native_entries
from lockstep.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeShape:
    """What of each answer is shown. `is_batch`: the prompts came as a list, so the answer is one too."""

    num_prompts: int = 1
    num_choices: int = 1
    is_batch: bool = False
    shows_logprobs: bool = False
    shows_prompt_logprobs: bool = False


_Entries = tuple[list[list[Any]], list[list[list[Any]]]]
"""Tokens and their alternatives as they are shown; every event shows all so far."""


@dataclass
class _Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: _Entries = field(default_factory=lambda: ([], []))
    last: CompletionDelta | None = None
    output: RequestOutput | None = None


class NativeReply:
    """Builds the answer to one /generate request of one or many prompts, choices of a prompt side by side."""

    def __init__(self, request_id: str, tokenizer: Tokenizer, shape: NativeShape) -> None:
        self._request_id = request_id
        self._tokenizer = tokenizer
        self._shape = shape
        self._choices = [_Choice() for _ in range(shape.num_prompts * shape.num_choices)]
        self._prompt_logprobs: list[_Entries] = [([], []) for _ in range(shape.num_prompts)]
        self._started_s = time.monotonic()

    def events(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The objects that one output of the engine becomes in a stream; several answers carry an `index`."""
        self._add(self._prompt_logprobs[prompt_index], output.prompt_logprobs)
        changed = []
        for delta in output.deltas:
            index = prompt_index * self._shape.num_choices + delta.index
            choice = self._choices[index]
            choice.text += delta.text
            choice.token_ids += delta.token_ids
            self._add(choice.logprobs, delta.logprobs)
            choice.last, choice.output = delta, output
            changed.append(index)
        return [self._shown(index) | ({"index": index} if self._many else {}) for index in changed]

    def body(self) -> Any:
        """The whole answer: one object, or a list for several prompts or choices."""
        shown = [self._shown(index) for index in range(len(self._choices))]
        return shown if self._many else shown[0]

    def _add(self, entries: _Entries, found: Sequence[TokenLogprob]) -> None:
        for shown, new in zip(entries, native_entries(self._tokenizer, found), strict=True):
            shown.extend(new)

    @property
    def _many(self) -> bool:
        return self._shape.is_batch or len(self._choices) > 1

    def _shown(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        assert choice.output is not None and choice.last is not None
        meta: dict[str, Any] = {
            "id": self._request_id,
            "finish_reason": _finish_reason(choice.last, len(choice.token_ids)),
            "prompt_tokens": choice.output.num_prompt_tokens,
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": choice.output.num_cached_tokens,
            "e2e_latency": time.monotonic() - self._started_s,
        }
        if self._shape.shows_logprobs:
            meta["output_token_logprobs"], meta["output_top_logprobs"] = choice.logprobs
        if self._shape.shows_prompt_logprobs:
            prompt_logprobs = self._prompt_logprobs[index // self._shape.num_choices]
            meta["input_token_logprobs"], meta["input_top_logprobs"] = prompt_logprobs
        return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": meta}


def _finish_reason(last: CompletionDelta, num_tokens: int) -> dict[str, Any] | None:
    if last.finish_reason is None:
        return None
    reason: dict[str, Any] = {"type": last.finish_reason}
    if last.finish_reason == "length":
        reason["length"] = num_tokens
    elif last.matched_stop is not None:
        reason["matched"] = last.matched_stop
    return reason
