"""What operators ask: is it alive, how loaded is it, forget the cache, end a request, metrics."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

import lockstep
from lockstep.core.errors import EngineDead, QueueFull
from lockstep.core.output import EngineStats
from lockstep.core.request import Pooling, Request
from lockstep.core.sampling import SamplingParams
from lockstep.server.conversion import new_id
from lockstep.server.gateway import Gateway
from lockstep.server.metrics import CONTENT_TYPE, prefix_hit_ratio
from lockstep.server.routes.serving import Serving, collected
from lockstep.server.schema.native import AbortRequest
from lockstep.server.wire import JsonResponse, until_disconnect

HEALTH_TIMEOUT_S = 30.0
"""A model that cannot make one token in this time is not healthy, whatever its load."""

router = APIRouter()


@router.get("/health")
async def health(gateway: Serving) -> Response:
    """200 while the engine lives and answers. Needs no key."""
    if not gateway.client.is_alive:
        raise EngineDead("the engine is not running; it is being started again")
    if not gateway.client.is_responsive:
        raise EngineDead("the engine has not answered for longer than its steps take; it may be stuck")
    return JsonResponse({"status": "ok"})


@router.get("/health_generate")
async def health_generate(http: HttpRequest, gateway: Serving) -> Response:
    """200 when one token, or one embedding, came out of the model within 30 s."""
    pooling: Pooling | None = gateway.client.card.pooling  # type: ignore[assignment]
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    request_id = new_id("health")
    request = Request(
        request_id=request_id,
        prompt_token_ids=(0,),
        params=params,
        pooling=pooling,
        deadline_s=HEALTH_TIMEOUT_S,
    )
    work = asyncio.wait_for(collected(gateway, request_id, [request]), HEALTH_TIMEOUT_S)
    try:
        await until_disconnect(http.receive, work)
    except asyncio.TimeoutError:
        raise EngineDead(f"the engine made no token within {HEALTH_TIMEOUT_S:g} s") from None
    except QueueFull:
        pass  # busy is healthy
    return JsonResponse({"status": "ok"})


@router.get("/server_info")
async def server_info(gateway: Serving) -> Response:
    """Version, options (never the key), model and figures."""
    options = dataclasses.asdict(gateway.options)
    options["api_key"] = options["api_key"] is not None
    stats = await gateway.client.stats()
    return JsonResponse(
        {
            "version": lockstep.__version__,
            "options": options,
            "model": dataclasses.asdict(gateway.client.card),
            "stats": dataclasses.asdict(stats),
        }
    )


@router.get("/v1/loads")
async def loads(gateway: Serving) -> Response:
    """How busy each engine is: one entry per replica, of which there is one."""
    return JsonResponse({"version": lockstep.__version__, "loads": [_load(await gateway.client.stats())]})


def _load(stats: EngineStats) -> dict[str, Any]:
    return {
        "dp_rank": 0,
        "num_running_reqs": stats.num_running,
        "num_waiting_reqs": stats.num_waiting,
        "num_used_tokens": stats.num_pages_in_use * stats.page_size,
        "max_total_num_tokens": stats.num_pages_total * stats.page_size,
        "token_usage": stats.num_pages_in_use / stats.num_pages_total if stats.num_pages_total else 0.0,
        "cached_tokens_held": stats.num_pages_cached * stats.page_size,
        "cache_hit_rate": prefix_hit_ratio(stats),
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_output_tokens": stats.num_output_tokens,
        "num_preemptions": stats.num_preemptions,
        "num_steps": stats.num_steps,
        "last_step_s": stats.last_step_s,
        "uptime_s": stats.uptime_s,
    }


@router.post("/flush_cache")
async def flush_cache(gateway: Serving) -> Response:
    """Forgets cached prefixes that no request uses."""
    return JsonResponse({"success": True, "num_pages_freed": await gateway.client.flush_cache()})


@router.post("/abort_request")
async def abort_request(body: AbortRequest, gateway: Serving) -> Response:
    """Ends one request with what it has, or all. An id that is not running may just have ended: no error."""
    num_aborted = await gateway.abort_all() if body.rid is None else await gateway.abort(body.rid)
    return JsonResponse({"num_aborted": num_aborted})


@router.get("/metrics")
async def metrics(gateway: Serving) -> Response:
    """Prometheus text format."""
    return Response(gateway.metrics.render(await _stats_or_none(gateway)), media_type=CONTENT_TYPE)


async def _stats_or_none(gateway: Gateway) -> EngineStats | None:
    try:
        return await gateway.client.stats()
    except EngineDead:
        return None
