"""/generate, /tokenize, /detokenize."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from lockstep.core.errors import InvalidRequest
from lockstep.core.request import Request
from lockstep.engine.client import EngineClient
from lockstep.server.conversion import (
    Constraint,
    check_constraint,
    check_token_ids,
    encode_prompt,
    make_request,
    new_id,
    requested_constraint,
    sampling_params,
)
from lockstep.server.replies.native import NativeReply, NativeShape
from lockstep.server.routes.serving import Outputs, Serving, answer_whole, prepared
from lockstep.server.schema.native import DetokenizeRequest, GenerateRequest, TokenizeRequest
from lockstep.server.streaming import EventStream
from lockstep.server.wire import JsonResponse, events

DEFAULT_MAX_NEW_TOKENS = 128

_CORE_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}

router = APIRouter()


def build_requests(
    body: GenerateRequest, client: EngineClient, request_id: str, constraint: Constraint | None
) -> list[Request]:
    """One core request per prompt. Raises InvalidRequest naming the field as /generate spells it."""
    fields = body.sampling_params
    param = "text" if body.text is not None else "input_ids"
    prompts = [encode_prompt(client, given, add_special_tokens=True, param=param) for given in body.prompts]
    requests = []
    for index, prompt in enumerate(prompts):
        room = max(1, client.card.context_length - len(prompt.token_ids))
        max_tokens = fields.max_new_tokens
        if max_tokens is None:
            max_tokens = min(max(DEFAULT_MAX_NEW_TOKENS, fields.min_new_tokens or 0), room)
        try:
            params = sampling_params(
                fields,
                grammar=constraint.grammar if constraint else None,
                max_tokens=max_tokens,
                min_tokens=fields.min_new_tokens,
                logprobs=(body.top_logprobs_num or 0) if body.return_logprob else None,
                prompt_logprobs=(body.top_logprobs_num or 0) if body.return_prompt_logprob else None,
            )
        except InvalidRequest as error:
            raise _renamed(error) from None
        requests.append(
            make_request(
                client,
                request_id if len(prompts) == 1 else f"{request_id}-{index}",
                prompt,
                params,
                prompt_param=param,
                max_tokens_param="max_new_tokens",
                priority=body.priority,
                deadline_s=body.deadline_s,
            )
        )
    check_constraint(client, constraint)
    return requests


def _renamed(error: InvalidRequest) -> InvalidRequest:
    text = str(error)
    for core_name, name in _CORE_NAMES.items():
        text = text.replace(core_name, name)
    return InvalidRequest(text, param=_CORE_NAMES.get(error.param or "", error.param), code=error.code)


@router.post("/generate")
async def generate(http: HttpRequest, body: GenerateRequest, gateway: Serving) -> Response:
    """Continues one or many prompts, whole or as a stream."""
    request_id = body.rid or new_id("gen")
    constraint = requested_constraint(body.sampling_params)
    requests = await prepared(lambda: build_requests(body, gateway.client, request_id, constraint))
    shape = NativeShape(
        num_prompts=len(requests),
        num_choices=requests[0].params.n,
        is_batch=body.is_batch,
        shows_logprobs=body.return_logprob,
        shows_prompt_logprobs=body.return_prompt_logprob,
    )
    reply = NativeReply(request_id, gateway.client.tokenizer, shape)
    outputs = gateway.outputs(request_id, requests, constraint)
    if body.stream:
        return EventStream(_pieces(outputs, reply))
    return await answer_whole(http, outputs, reply.events, reply.body)


async def _pieces(outputs: Outputs, reply: NativeReply) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs) as arriving:
        async for index, output in arriving:
            yield events(reply.events(index, output))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, gateway: Serving) -> Response:
    """Ids of a text."""
    gateway.check_model(body.model)
    tokenizer = gateway.client.tokenizer
    token_ids = await prepared(
        lambda: tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    )
    found: dict[str, Any] = {"tokens": token_ids, "count": len(token_ids)}
    return JsonResponse(found | {"max_model_len": gateway.client.card.context_length})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, gateway: Serving) -> Response:
    """The text of ids."""
    gateway.check_model(body.model)
    check_token_ids(gateway.client, body.tokens, "tokens")
    tokenizer = gateway.client.tokenizer
    text = await prepared(lambda: tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens))
    return JsonResponse({"text": text})
