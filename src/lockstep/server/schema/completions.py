"""The bodies of /v1/completions and /v1/embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lockstep.server.schema.base import OpenAIFields, Priority, Prompts, Seconds, Strict


class CompletionRequest(OpenAIFields):
    """https://platform.openai.com/docs/api-reference/completions/create and docs/http.md."""

    ignored: ClassVar[Mapping[str, str]] = {"user": "end users are not tracked"}

    prompt: Prompts
    max_tokens: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingRequest(Strict):
    """https://platform.openai.com/docs/api-reference/embeddings/create and docs/http.md."""

    ignored: ClassVar[Mapping[str, str]] = {"user": "end users are not tracked"}

    input: Prompts
    model: str | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    deadline_s: Seconds | None = None
