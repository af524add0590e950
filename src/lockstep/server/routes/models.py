"""/v1/models and /model_info: what is served."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from lockstep.server.gateway import Gateway
from lockstep.server.routes.serving import Serving
from lockstep.server.wire import JsonResponse

router = APIRouter()


def _model_object(gateway: Gateway) -> dict[str, Any]:
    card = gateway.client.card
    return {
        "id": gateway.model_name,
        "object": "model",
        "created": gateway.started_at_s,
        "owned_by": "lockstep",
        "root": card.path,
        "max_model_len": card.context_length,
    }


@router.get("/v1/models")
async def list_models(gateway: Serving) -> Response:
    """The served model, as a list of one."""
    return JsonResponse({"object": "list", "data": [_model_object(gateway)]})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, gateway: Serving) -> Response:
    """The served model by its name."""
    gateway.check_model(model_id)
    return JsonResponse(_model_object(gateway))


@router.get("/model_info")
async def model_info(gateway: Serving) -> Response:
    """Everything that clients may know of the model."""
    client = gateway.client
    template = client.tokenizer.chat_template
    return JsonResponse(
        dataclasses.asdict(client.card)
        | {
            "model_path": client.card.path,
            "is_generation": client.card.pooling is None,
            "has_chat_template": template is not None,
            "template_supports_tools": template is not None and template.supports_tools,
        }
    )
