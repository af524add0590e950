"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from lockstep.core.errors import InvalidRequest
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.client import EngineClient
from lockstep.server.conversion import (
    Constraint,
    Prompt,
    check_constraint,
    encode_prompt,
    make_request,
    new_id,
    requested_constraint,
    sampling_params,
)
from lockstep.server.replies.completion import CompletionReply, CompletionShape
from lockstep.server.routes.serving import Outputs, Serving, answer_whole, prepared
from lockstep.server.schema.completions import CompletionRequest
from lockstep.server.streaming import EventStream
from lockstep.server.wire import events

DEFAULT_MAX_TOKENS = 16
"""What OpenAI's specification says for this endpoint; cut to what the context still holds."""

router = APIRouter()


def plan_shape(body: CompletionRequest) -> CompletionShape:
    """What of the answers is shown. Raises InvalidRequest for fields that cannot go together."""
    num_choices = 1 if body.n is None else body.n
    num_candidates = num_choices if body.best_of is None else body.best_of
    if body.suffix:
        raise InvalidRequest("suffix is not supported: models served here only continue text", param="suffix")
    if body.max_tokens is not None and body.max_tokens < 0:
        raise InvalidRequest(f"max_tokens must be at least 0, not {body.max_tokens}", param="max_tokens")
    if num_choices < 1:
        raise InvalidRequest(f"n takes numbers from 1, not {num_choices}", param="n")
    if num_candidates < num_choices:
        raise InvalidRequest(f"best_of {num_candidates} is less than n {num_choices}", param="best_of")
    if num_candidates > num_choices and body.stream:
        raise InvalidRequest(
            "best_of more than n cannot be streamed: the best is known at the end", param="best_of"
        )
    return CompletionShape(
        num_choices=num_choices,
        num_candidates=num_candidates,
        echo=bool(body.echo),
        num_logprobs=body.logprobs,
        drops_output=body.max_tokens == 0,
        skip_special_tokens=body.skip_special_tokens is not False,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        wants_usage_chunk=body.wants_usage_chunk,
    )


def build_params(
    body: CompletionRequest, shape: CompletionShape, constraint: Constraint | None
) -> SamplingParams:
    """Sampling parameters of every prompt of the body; `max_tokens` stays open when none was given."""
    logprobs = body.logprobs
    if logprobs is None and shape.num_candidates > shape.num_choices:
        logprobs = 0  # the candidates are ranked by it
    asked = [k for k in (body.prompt_logprobs, body.logprobs if body.echo else None) if k is not None]
    return sampling_params(
        body,
        grammar=constraint.grammar if constraint else None,
        n=shape.num_candidates,
        max_tokens=1 if shape.drops_output else body.max_tokens,
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=max(asked, default=None),
    )


def build_requests(
    body: CompletionRequest,
    client: EngineClient,
    request_id: str,
    shape: CompletionShape,
    constraint: Constraint | None,
) -> tuple[list[Prompt], list[Request]]:
    """The prompts and core requests of a completion body. Raises InvalidRequest naming the field."""
    params = build_params(body, shape, constraint)
    special = body.add_special_tokens is not False
    prompts = [
        encode_prompt(client, given, add_special_tokens=special, param="prompt") for given in body.prompt
    ]
    client.tokenizer.require_text("an answer of text")
    requests = [
        make_request(
            client,
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt,
            _with_default_length(params, prompt, client),
            prompt_param="prompt",
            priority=body.priority,
            deadline_s=body.deadline_s,
        )
        for index, prompt in enumerate(prompts)
    ]
    check_constraint(client, constraint)
    return prompts, requests


def _with_default_length(params: SamplingParams, prompt: Prompt, client: EngineClient) -> SamplingParams:
    if params.max_tokens is not None:
        return params
    room = max(1, client.card.context_length - len(prompt.token_ids))
    return replace(params, max_tokens=min(max(DEFAULT_MAX_TOKENS, params.min_tokens), room))


@router.post("/v1/completions")
async def completions(http: HttpRequest, body: CompletionRequest, gateway: Serving) -> Response:
    """Continues one or many prompts, whole or as a stream."""
    gateway.check_model(body.model)
    shape = plan_shape(body)
    request_id = body.request_id or new_id("cmpl")
    constraint = requested_constraint(body)
    prompts, requests = await prepared(
        lambda: build_requests(body, gateway.client, request_id, shape, constraint)
    )
    reply = CompletionReply(request_id, gateway.model_name, gateway.client.tokenizer, prompts, shape)
    outputs = gateway.outputs(request_id, requests, constraint)
    if body.stream:
        return EventStream(_pieces(outputs, reply))
    return await answer_whole(http, outputs, reply.chunks, reply.body)


async def _pieces(outputs: Outputs, reply: CompletionReply) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs) as arriving:
        async for index, output in arriving:
            if chunks := reply.chunks(index, output):
                yield events(chunks)
    if last := reply.last_chunk():
        yield events([last])
