"""Strict request models: an unknown field is an error that names the nearest valid one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lockstep.core.errors import nearest


class Strict(BaseModel):
    """A JSON object with declared fields only and no conversion between types.

    `ignored` maps further accepted names to why they have no effect here; their values are dropped unread.
    """

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    ignored: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def wire_names(cls) -> list[str]:
        """Names of all accepted fields, those with an effect first."""
        return [field.alias or name for name, field in cls.model_fields.items()] + list(cls.ignored)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.wire_names()
        for name in data:
            if name not in known:
                hint = nearest(name, known)
                raise PydanticCustomError("unknown_field", "unknown field{hint}", {"field": name, "hint": hint})
        return {name: value for name, value in data.items() if name not in cls.ignored}


MAX_PROMPTS = 16_384
"""Of one request: what reads them takes no longer than another request may wait."""


def _as_list(value: Any) -> Any:
    """A lone string becomes a list of one."""
    return [value] if isinstance(value, str) else value


def as_prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four spellings of prompts, as a list of texts and token id lists, MAX_PROMPTS of them at most."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_int(item) for item in value):
            return [value]
        refuse_too_many(value)
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(_is_int(i) for i in item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type",
        "expected a string, a list of strings, a list of token ids or a list of lists of token ids",
    )


def refuse_too_many(prompts: Any) -> Any:
    """The same, unless it is a list of more than MAX_PROMPTS."""
    if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError(
            "too_many_prompts",
            "{given} prompts in one request; send at most {most} at a time",
            {"given": len(prompts), "most": MAX_PROMPTS},
        )
    return prompts


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_biases(value: Any) -> Any:
    """The first value that is no number is one complaint; a million of them would be a million."""
    wrong = (
        next((bias for bias in value.values() if not _is_number(bias)), None)
        if isinstance(value, dict)
        else None
    )
    if wrong is not None:
        raise PydanticCustomError("logit_bias", "expected numbers as values")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


StringOrList = Annotated[list[str], Field(fail_fast=True), BeforeValidator(_as_list)]
"""A string or a list of strings. What is wrong with lists is said of the first entry alone, however long they are."""

Prompts = Annotated[list[Any], BeforeValidator(as_prompts)]
"""One or many prompts: each item is a text or a list of token ids."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StreamOptions(Strict):
    """How a stream ends."""

    ignored: ClassVar[Mapping[str, str]] = {"include_obfuscation": "chunks carry no padding"}

    include_usage: bool | None = None


class JsonSchemaFormat(Strict):
    """The `json_schema` member of a response format."""

    ignored: ClassVar[Mapping[str, str]] = {
        "strict": "every schema is enforced",
        "description": "not shown to the model",
    }

    name: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]


class ResponseFormat(Strict):
    """What the text must be. `json_schema` is required for, and only for, the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_due(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", "'json_schema' must be given exactly when 'type' is 'json_schema'"
            )
        return self


class SamplingFields(Strict):
    """What every generating endpoint accepts, OpenAI's fields and our extensions; null means the default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_biases)] = None
    seed: int | None = None
    n: int | None = None
    stop: StringOrList | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None


Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class OpenAIFields(SamplingFields):
    """What chat and text completions share beyond sampling."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    priority: Priority | None = None
    deadline_s: Seconds | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> OpenAIFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options",
                "only allowed when 'stream' is true",
                {"field": "stream_options"},
            )
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        """True when the stream must end with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)
