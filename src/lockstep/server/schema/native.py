"""The bodies of the native endpoints. `/generate` speaks the dialect that SGLang's clients use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from lockstep.server.schema.base import (
    Priority,
    SamplingFields,
    Seconds,
    Strict,
    as_prompts,
    refuse_too_many,
)

RequestId = Annotated[str, Field(min_length=1, max_length=128)]


class NativeSamplingParams(SamplingFields):
    """`sampling_params` of /generate."""

    ignored: ClassVar[Mapping[str, str]] = {
        "spaces_between_special_tokens": "special tokens are written as they are"
    }

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None


def _check_token_ids(value: Any) -> Any:
    """A list of ids, or a list of such lists."""
    if value is None or (
        isinstance(value, list) and not any(isinstance(item, str) for item in as_prompts(value))
    ):
        return value
    raise PydanticCustomError("input_ids", "expected a list of token ids or a list of such lists")


class GenerateRequest(Strict):
    """One prompt or many; exactly one of `text` and `input_ids`."""

    text: Annotated[
        str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | None, BeforeValidator(refuse_too_many)
    ] = None
    input_ids: Annotated[list[Any] | None, BeforeValidator(_check_token_ids)] = None
    sampling_params: NativeSamplingParams = Field(default_factory=NativeSamplingParams)
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: int | None = None
    return_prompt_logprob: bool = False
    rid: RequestId | None = None
    priority: Priority | None = None
    deadline_s: Seconds | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if (self.text is None) == (self.input_ids is None):
            raise PydanticCustomError("prompt", "give exactly one of 'text' and 'input_ids'", {"field": "text"})
        return self

    @property
    def is_batch(self) -> bool:
        """True when the prompts came as a list, so that the answer is a list too."""
        given = self.input_ids if self.text is None else self.text
        return isinstance(given, list) and isinstance(given[0], (str, list))

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, however they were given."""
        return as_prompts(self.input_ids if self.text is None else self.text)


class TokenizeRequest(Strict):
    """One text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """One list of token ids."""

    tokens: Annotated[list[int], Field(fail_fast=True)]
    model: str | None = None
    skip_special_tokens: bool = True


class AbortRequest(Strict):
    """Which requests to end: one by its id, or all."""

    rid: RequestId | None = None
    abort_all: bool = False

    @model_validator(mode="after")
    def _one_target(self) -> AbortRequest:
        if (self.rid is None) != self.abort_all:
            raise PydanticCustomError("abort", "give either 'rid' or 'abort_all': true", {"field": "rid"})
        return self
