"""What the endpoints share: reaching the gateway, and running work that ends when the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest
from starlette.responses import Response

from lockstep.core.output import RequestOutput
from lockstep.core.request import Request
from lockstep.server.gateway import Gateway
from lockstep.server.wire import JsonResponse, until_disconnect

T = TypeVar("T")

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


def _gateway_of(request: HttpRequest) -> Gateway:
    return request.app.state.gateway


Serving = Annotated[Gateway, Depends(_gateway_of)]
"""A handler's parameter of this type is the app's gateway."""


async def prepared(work: Callable[[], T]) -> T:
    """The result of rendering, tokenising and compiling, done aside so that streams of others flow on."""
    return await asyncio.to_thread(work)


async def answer_whole(
    http: HttpRequest,
    outputs: Outputs,
    note: Callable[[int, RequestOutput], object],
    body: Callable[[], Any],
) -> Response:
    """Shows every output to `note`, then answers with `body()`; aborts when the client hangs up."""

    async def collect() -> None:
        async with aclosing(outputs) as arriving:
            async for index, output in arriving:
                note(index, output)

    await until_disconnect(http.receive, collect())
    return JsonResponse(body())


async def collected(gateway: Gateway, group_id: str, requests: Sequence[Request]) -> list[RequestOutput]:
    """The last output of each request."""
    async with aclosing(gateway.outputs(group_id, requests)) as arriving:
        last = {index: output async for index, output in arriving}
    return [last[index] for index in range(len(requests))]
