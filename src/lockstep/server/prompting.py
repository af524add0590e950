"""From chat messages to the prompt text, by the model's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lockstep.core.errors import InvalidRequest
from lockstep.server.schema.chat import ChatCompletionRequest, ChatMessage, Tool
from lockstep.server.tools.registry import tool_instructions
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.conversation import TEMPLATE_ROLES

_RESERVED = ("messages", "tools", "add_generation_prompt")


def render_prompt(template: ChatTemplate | None, body: ChatCompletionRequest, tools: Sequence[Tool]) -> str:
    """The prompt text, special tokens spelled out. `tools` are those the model may know of.

    Raises InvalidRequest when there is no template, when it refuses the messages, or when the final message
    cannot be continued.
    """
    if template is None:
        raise InvalidRequest(
            "this model has no chat template; use /v1/completions, or serve it with --chat-template FILE",
            param="messages",
            code="no_chat_template",
        )
    variables = body.chat_template_kwargs or {}
    if clash := [name for name in _RESERVED if name in variables]:
        raise InvalidRequest(
            f"{clash[0]!r} is a field of its own, not a template variable", param="chat_template_kwargs"
        )
    messages = [_as_template_message(message) for message in body.messages]
    offered = [tool.model_dump(exclude_none=True) for tool in tools] or None
    if offered and not template.supports_tools:
        messages = _with_instructions(messages, tool_instructions(offered))
        offered = None
    elif not template.supports_tools and any(message.get("tool_calls") for message in messages):
        # Calls of before stay in the conversation, whether or not tools are offered now.
        messages = [_spelled_out(message) for message in messages]
    if body.continue_final_message:
        return _continued(template, messages, offered, variables)
    wants_answer = body.add_generation_prompt is not False
    return template.render(messages, tools=offered, add_generation_prompt=wants_answer, **variables)


def _as_template_message(message: ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {
        "role": TEMPLATE_ROLES.get(message.role, message.role),
        "content": message.content or "",
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _parsed(arguments: str) -> Any:
    """Templates expect an object; what is no JSON stays text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _with_instructions(messages: list[dict[str, Any]], instructions: str) -> list[dict[str, Any]]:
    """Puts the description of the tools into the system message, and spells tool traffic out as text."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if system or messages[0]["role"] == "system" else messages
    first = {"role": "system", "content": f"{system}\n\n{instructions}" if system else instructions}
    return [first, *(_spelled_out(message) for message in rest)]


def _spelled_out(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls
    ]
    return {"role": "assistant", "content": "\n".join([message["content"], *written]).strip()}


_CUT = "\u2060<lockstep: the answer goes on here>\u2060"
"""No message holds this."""


def _continued(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> str:
    """The prompt up to the end of the final message, without what the template writes after it."""
    final = messages[-1]["content"].rstrip()
    # What a template writes after a message may hold the message's text.
    marked = [*messages[:-1], {**messages[-1], "content": final + _CUT}]
    text = template.render(marked, tools=tools, add_generation_prompt=False, **variables)
    start = text.rfind(_CUT) if final else -1
    if start < 0:
        raise InvalidRequest(
            "the final message is empty or the template changes it, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:start]
