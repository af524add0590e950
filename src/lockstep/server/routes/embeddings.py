"""/v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, cast

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from lockstep.core.errors import InvalidRequest
from lockstep.core.output import RequestOutput
from lockstep.core.request import Pooling, Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.client import EngineClient
from lockstep.server.conversion import encode_prompt, make_request, new_id
from lockstep.server.errors import GenerationFailed
from lockstep.server.routes.serving import Serving, answer_whole, prepared
from lockstep.server.schema.completions import EmbeddingRequest

router = APIRouter()


def build_requests(body: EmbeddingRequest, client: EngineClient, request_id: str) -> list[Request]:
    """One request per input. Raises InvalidRequest naming the field."""
    pooling = client.card.pooling
    if pooling is None:
        raise InvalidRequest(
            f"model {client.card.name!r} declares no pooling; serve an embedding model instead",
            param="model",
            code="not_an_embedding_model",
        )
    special = body.add_special_tokens is not False
    return [
        make_request(
            client,
            f"{request_id}-{index}",
            encode_prompt(client, given, add_special_tokens=special, param="input"),
            SamplingParams(),
            prompt_param="input",
            priority=body.priority,
            deadline_s=body.deadline_s,
            pooling=cast(Pooling, pooling),
        )
        for index, given in enumerate(body.input)
    ]


@router.post("/v1/embeddings")
async def embeddings(http: HttpRequest, body: EmbeddingRequest, gateway: Serving) -> Response:
    """One vector per input, normalised as the model declares it."""
    gateway.check_model(body.model)
    request_id = new_id("embd")
    requests = await prepared(lambda: build_requests(body, gateway.client, request_id))
    found: dict[int, RequestOutput] = {}
    return await answer_whole(
        http,
        gateway.outputs(request_id, requests),
        found.__setitem__,
        lambda: _body(body, gateway.model_name, [found[index] for index in range(len(requests))]),
    )


def _body(body: EmbeddingRequest, model: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(_vector(output, body.dimensions), body)}
        for index, output in enumerate(outputs)
    ]
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _vector(output: RequestOutput, dimensions: int | None) -> tuple[float, ...]:
    vector = output.embedding
    if vector is None:
        raise GenerationFailed(
            "the engine ended this request without an embedding; it was aborted or ran out of time"
        )
    if dimensions is not None and dimensions != len(vector):
        raise InvalidRequest(
            f"this model's embeddings have {len(vector)} dimensions, not {dimensions}", param="dimensions"
        )
    return vector


def _encoded(vector: tuple[float, ...], body: EmbeddingRequest) -> list[float] | str:
    """Numbers, or the base64 of little-endian float32, which is what the official client asks for."""
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
