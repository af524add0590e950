"""Legacy text completions: whole, and as a stream of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.core.output import CompletionDelta, RequestOutput
from lockstep.core.step import TokenLogprob
from lockstep.server.conversion import Prompt
from lockstep.server.logprobs import LegacyLogprobs, prompt_entries
from lockstep.server.replies.common import Usage, created_s
from lockstep.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape:
    """What of each answer is shown.

    `num_candidates` answers are sampled per prompt and the `num_choices` likeliest shown. `num_logprobs` None
    shows none. `drops_output` is for max_tokens 0: the engine samples one token, which is not shown.
    """

    num_choices: int = 1
    num_candidates: int = 1
    echo: bool = False
    num_logprobs: int | None = None
    drops_output: bool = False
    skip_special_tokens: bool = True
    shows_prompt_logprobs: bool = False
    wants_usage_chunk: bool = False


@dataclass
class _Choice:
    legacy: LegacyLogprobs
    text: str = ""
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    sum_logprob: float = 0.0
    num_tokens: int = 0
    finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprob / self.num_tokens if self.num_tokens else float("-inf")


class CompletionReply:
    """Builds the answer to one completion request of one or many prompts."""

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        shape: CompletionShape,
    ) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": created_s(), "model": model}
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._shape = shape
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]
        self._usage = Usage(counts_output=not shape.drops_output)

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks that one output of the engine becomes."""
        self._usage.note(prompt_index, output)
        self._prompt_logprobs[prompt_index] += output.prompt_logprobs
        return [self._chunk([self._grow(prompt_index, delta)]) for delta in output.deltas]

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk of token counts, if it was asked for."""
        if not self._shape.wants_usage_chunk:
            return None
        return self._chunk([]) | {"usage": self._usage.as_openai()}

    def body(self) -> dict[str, Any]:
        """The whole answer, after `chunks` has seen every output."""
        choices = [
            self._whole(prompt_index, choice)
            for prompt_index in range(len(self._prompts))
            for choice in self._best(prompt_index)
        ]
        numbered = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {**self._head, "choices": numbered, "usage": self._usage.as_openai()}

    def _grow(self, prompt_index: int, delta: CompletionDelta) -> dict[str, Any]:
        key = (prompt_index, delta.index)
        echo, echoed = "", list[tuple[int, TokenLogprob | None]]()
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = _Choice(self._new_logprobs())
            if self._shape.echo:
                echo, echoed = self._echo(prompt_index)
        new = () if self._shape.drops_output else delta.logprobs
        text = echo + ("" if self._shape.drops_output else delta.text)
        choice.text += text
        choice.num_tokens += len(delta.token_ids)
        choice.sum_logprob += sum([found.logprob for found in delta.logprobs])
        logprobs = None
        if self._shape.num_logprobs is not None:
            logprobs = choice.legacy.add_echo(echoed, echo) if echoed else {}
            _extend(logprobs, choice.legacy.add((found.token_id, found) for found in new))
            _extend(choice.logprobs, logprobs)
        choice.finish_reason = delta.finish_reason
        if self._shape.drops_output and delta.finish_reason == "stop":
            choice.finish_reason = "length"
        shown = {"text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return {"index": prompt_index * self._shape.num_choices + delta.index, **shown}

    def _new_logprobs(self) -> LegacyLogprobs:
        return LegacyLogprobs(self._tokenizer, self._shape.num_logprobs or 0, self._shape.skip_special_tokens)

    def _echo(self, prompt_index: int) -> tuple[str, list[tuple[int, TokenLogprob | None]]]:
        prompt = self._prompts[prompt_index]
        text = prompt.text
        if text is None:
            text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._shape.skip_special_tokens)
        found = [None, *self._prompt_logprobs[prompt_index]]
        return text, list(zip(prompt.token_ids, found, strict=False))

    def _best(self, prompt_index: int) -> list[_Choice]:
        """The choices to show: all, or the likeliest per token of the candidates."""
        shape = self._shape
        found = [self._choices[prompt_index, index] for index in range(shape.num_candidates)]
        if shape.num_candidates > shape.num_choices:
            found.sort(key=lambda choice: choice.mean_logprob, reverse=True)
        return found[: shape.num_choices]

    def _whole(self, prompt_index: int, choice: _Choice) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "text": choice.text,
            "logprobs": choice.logprobs if self._shape.num_logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }
        if self._shape.shows_prompt_logprobs:
            shown["prompt_logprobs"] = prompt_entries(self._tokenizer, self._prompt_logprobs[prompt_index])
        return shown

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": choices}
        if self._shape.wants_usage_chunk:
            chunk["usage"] = None
        return chunk


def _extend(logprobs: dict[str, list[Any]], newer: dict[str, list[Any]]) -> None:
    for name, values in newer.items():
        logprobs.setdefault(name, []).extend(values)
