"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from lockstep.server.schema.base import OpenAIFields, Strict

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

TEXT_PARTS = ("text", "refusal")
OTHER_PARTS = ("image_url", "input_audio", "file")


def _as_text(content: Any) -> Any:
    """Joins content parts; a part that is not text is refused by name."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PydanticCustomError("content", "expected a string or an array of content parts")
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in OTHER_PARTS:
        raise PydanticCustomError(
            "content",
            "this model reads text only; a content part of type {kind} cannot be used",
            {"kind": repr(kind)},
        )
    if kind not in TEXT_PARTS or not isinstance(part.get(kind), str):
        raise PydanticCustomError(
            "content", "a content part is an object such as {example}", {"example": _EXAMPLE}
        )
    return part[kind]


_EXAMPLE = '{"type": "text", "text": "..."}'

Content = Annotated[str, BeforeValidator(_as_text)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class CalledFunction(Strict):
    """The function that an assistant message called; `arguments` is JSON text."""

    name: str
    arguments: str


def _refuse_custom(data: Any) -> Any:
    """Says that custom tools exist, but not here, instead of naming their fields one by one."""
    if isinstance(data, dict) and data.get("type") == "custom":
        raise PydanticCustomError(
            "custom_tool",
            "custom tools are not supported: what is called is a function, with JSON for arguments",
            {"field": "type"},
        )
    return data


class FunctionsOnly(Strict):
    """An object whose type OpenAI also lets be "custom", for tools that take free text."""

    @model_validator(mode="before")
    @classmethod
    def _no_custom_tool(cls, data: Any) -> Any:
        return _refuse_custom(data)


class ToolCallMessage(FunctionsOnly):
    """One call in an assistant message."""

    ignored: ClassVar[Mapping[str, str]] = {"index": "position in a stream, sent back by some clients"}

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message of the conversation, of any role."""

    ignored: ClassVar[Mapping[str, str]] = {
        "refusal": "a model's earlier refusal is not shown to it",
        "annotations": "links of an earlier answer",
        "audio": "text only",
        "function_call": "deprecated by OpenAI; use tool_calls",
    }

    role: Role
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "content", "a message of role '{role}' needs content", {"role": self.role}
            )
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool_call_id", "a message of role 'tool' needs tool_call_id")
        if self.role == "function" and self.name is None:
            raise PydanticCustomError("name", "a message of role 'function' needs name")
        return self


class FunctionDefinition(Strict):
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    ignored: ClassVar[Mapping[str, str]] = {"strict": "forced calls always follow the schema"}

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _object_parameters(self) -> FunctionDefinition:
        if self.parameters and self.parameters.get("type", "object") != "object":
            raise PydanticCustomError("parameters", "parameters must be a JSON schema of type 'object'")
        return self


class Tool(FunctionsOnly):
    """A tool on offer. Only functions exist here."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The function that must be called."""

    name: str


class NamedToolChoice(FunctionsOnly):
    """Forces one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Strict):
    """Some of the offered tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, fail_fast=True)]


class AllowedToolsChoice(Strict):
    """As if only these tools were offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    @property
    def mode(self) -> str:
        """ "auto" or "required"."""
        return self.allowed_tools.mode

    @property
    def names(self) -> list[str]:
        """The allowed functions."""
        return [tool.function.name for tool in self.allowed_tools.tools]


def _as_tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, dict) or value in ("none", "auto", "required"):
        return value
    raise PydanticCustomError(
        "tool_choice", "expected 'none', 'auto', 'required' or an object that names functions"
    )


def _kind_of_choice(value: Any) -> str:
    """The tag of the union's member that a valid or invalid choice is read as."""
    if isinstance(value, str):
        return "str"
    kind = value.get("type") if isinstance(value, dict) else value.type
    return "AllowedToolsChoice" if kind == "allowed_tools" else "NamedToolChoice"


ToolChoice = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[NamedToolChoice, Tag("NamedToolChoice")]
    | Annotated[AllowedToolsChoice, Tag("AllowedToolsChoice")],
    Discriminator(_kind_of_choice),
]


class ChatCompletionRequest(OpenAIFields):
    """https://platform.openai.com/docs/api-reference/chat/create and docs/http.md."""

    ignored: ClassVar[Mapping[str, str]] = {
        "audio": "the answer is text",
        "function_call": "deprecated by OpenAI; use tool_choice",
        "functions": "deprecated by OpenAI; use tools",
        "metadata": "nothing is stored",
        "modalities": "the answer is text",
        "moderation": "no moderation model runs here",
        "prediction": "no effect on the answer",
        "prompt_cache_key": "prefixes are always shared",
        "prompt_cache_options": "prefixes are always shared",
        "prompt_cache_retention": "cached prefixes stay until their pages are needed",
        "reasoning_effort": "templates take such switches in chat_template_kwargs",
        "safety_identifier": "end users are not tracked",
        "service_tier": "use priority",
        "store": "nothing is stored",
        "user": "end users are not tracked",
        "verbosity": "no effect on the answer",
        "web_search_options": "the server reaches no network",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_as_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "needs 'logprobs': true", {"field": "top_logprobs"})
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError(
                "continue", "needs a last message of role 'assistant'", {"field": "continue_final_message"}
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue",
                "excludes 'add_generation_prompt': true",
                {"field": "continue_final_message"},
            )
        self._check_tool_choice()
        return self

    def _check_tool_choice(self) -> None:
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have the same name", {"field": "tools"})
        if choice in (None, "none", "auto"):
            return
        if not names:
            raise PydanticCustomError("tool_choice", "needs 'tools'", {"field": "tool_choice"})
        chosen = [choice.function.name] if isinstance(choice, NamedToolChoice) else []
        if isinstance(choice, AllowedToolsChoice):
            chosen = choice.names
        for name in chosen:
            if name not in names:
                raise PydanticCustomError(
                    "tool_choice",
                    "no tool is named {name}; expected one of: {names}",
                    {"field": "tool_choice", "name": repr(name), "names": ", ".join(names)},
                )
