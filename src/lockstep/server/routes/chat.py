"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from lockstep.core.errors import InvalidRequest
from lockstep.core.request import Request
from lockstep.engine.client import EngineClient
from lockstep.server.conversion import (
    Constraint,
    check_constraint,
    encode_prompt,
    make_request,
    new_id,
    requested_constraint,
    sampling_params,
)
from lockstep.server.gateway import Gateway
from lockstep.server.prompting import render_prompt
from lockstep.server.replies.chat import ChatReply
from lockstep.server.routes.serving import Outputs, Serving, answer_whole, prepared
from lockstep.server.schema.chat import AllowedToolsChoice, ChatCompletionRequest, NamedToolChoice, Tool
from lockstep.server.streaming import EventStream
from lockstep.server.tools.forced import (
    NamedCallReader,
    RequiredCallsReader,
    named_call_grammar,
    required_calls_grammar,
)
from lockstep.server.tools.reader import AnswerReader, FirstCallReader, TextReader
from lockstep.server.tools.registry import choose_reader
from lockstep.server.wire import events

router = APIRouter()


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Which tools the model hears of, what its answer is held to, and who takes the answer apart."""

    offered: tuple[Tool, ...]
    make_reader: Callable[[], AnswerReader]
    constraint: Constraint | None = None


def plan_tools(body: ChatCompletionRequest, client: EngineClient, parser: str | None) -> ToolPlan:
    """What `tools`, `tool_choice` and `parallel_tool_calls` mean together."""
    tools, choice = tuple(body.tools or ()), body.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        tools, choice = tuple(tool for tool in tools if tool.function.name in choice.names), choice.mode
    if not tools or choice == "none":
        return ToolPlan((), TextReader)
    if isinstance(choice, NamedToolChoice):
        chosen = next(tool.function for tool in tools if tool.function.name == choice.function.name)
        constraint = Constraint(named_call_grammar(chosen), "tools")
        return ToolPlan(tools, lambda: NamedCallReader(chosen.name), constraint)
    if choice == "required":
        grammar = required_calls_grammar(
            [tool.function for tool in tools], parallel=body.parallel_tool_calls is not False
        )
        return ToolPlan(tools, RequiredCallsReader, Constraint(grammar, "tools"))
    template = client.tokenizer.chat_template
    reader = choose_reader(parser, "\n".join(template.sources.values()) if template else None)
    names = frozenset(tool.function.name for tool in tools)
    if body.parallel_tool_calls is False:
        return ToolPlan(tools, lambda: FirstCallReader(reader(names)))
    return ToolPlan(tools, lambda: reader(names))


def choose_constraint(body: ChatCompletionRequest, plan: ToolPlan) -> Constraint | None:
    """What the answer is held to. Raises InvalidRequest when a forced call meets another constraint."""
    asked = requested_constraint(body)
    if asked is not None and plan.constraint is not None:
        raise InvalidRequest(
            "a forced tool call excludes response_format, regex, ebnf and json_schema", param="tool_choice"
        )
    return asked or plan.constraint


def build_request(
    body: ChatCompletionRequest,
    client: EngineClient,
    request_id: str,
    plan: ToolPlan,
    constraint: Constraint | None,
) -> Request:
    """The core request of a chat body. Raises InvalidRequest naming the field."""
    given, param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        given, param = body.max_completion_tokens, "max_completion_tokens"
    if given is not None and given < 1:
        raise InvalidRequest(f"{param} must be at least 1, not {given}", param=param)
    params = sampling_params(
        body,
        grammar=constraint.grammar if constraint else None,
        max_tokens=given,
        min_tokens=body.min_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    text = render_prompt(client.tokenizer.chat_template, body, plan.offered)
    prompt = encode_prompt(client, text, add_special_tokens=bool(body.add_special_tokens), param="messages")
    request = make_request(
        client,
        request_id,
        prompt,
        params,
        prompt_param="messages",
        max_tokens_param=param,
        priority=body.priority,
        deadline_s=body.deadline_s,
    )
    check_constraint(client, constraint)
    return request


@router.post("/v1/chat/completions")
async def chat_completions(http: HttpRequest, body: ChatCompletionRequest, gateway: Serving) -> Response:
    """Answers a conversation, whole or as a stream."""
    gateway.check_model(body.model)
    request_id = body.request_id or new_id("chatcmpl")
    plan = plan_tools(body, gateway.client, gateway.options.tool_call_parser)
    constraint = choose_constraint(body, plan)
    request = await prepared(lambda: build_request(body, gateway.client, request_id, plan, constraint))
    reply = _new_reply(gateway, request, plan, body)
    outputs = gateway.outputs(request_id, [request], constraint)
    if body.stream:
        return EventStream(_pieces(outputs, reply))
    return await answer_whole(http, outputs, lambda _, output: reply.chunks(output), reply.body)


def _new_reply(gateway: Gateway, request: Request, plan: ToolPlan, body: ChatCompletionRequest) -> ChatReply:
    return ChatReply(
        request.request_id,
        gateway.model_name,
        gateway.client.tokenizer,
        plan.make_reader,
        num_choices=request.params.n,
        wants_logprobs=request.params.logprobs is not None,
        wants_prompt_logprobs=request.params.prompt_logprobs is not None,
        wants_usage=body.wants_usage_chunk,
    )


async def _pieces(outputs: Outputs, reply: ChatReply) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs) as arriving:
        async for _, output in arriving:
            if chunks := reply.chunks(output):
                yield events(chunks)
    if last := reply.last_chunk():
        yield events([last])
