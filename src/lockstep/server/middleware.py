"""What every request passes: counting, the API key, the size limit. Plain ASGI, so streams stay streams."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.server.errors import http_error_response
from lockstep.server.metrics import Metrics
from lockstep.server.wire import OUTCOME, SEND_BODY

OPEN_PATHS = frozenset({"/", "/health"})
"""Served without a key: the page asks for it, and a load balancer has none."""


class CountRequests:
    """Adds each finished request to the metrics, by route and outcome."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[SEND_BODY] = send
        try:
            await self._app(scope, receive, noting_status)
        finally:
            outcome = scope.get(OUTCOME) or _outcome_of(status)
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.count_request(route, outcome)


def _outcome_of(status: int) -> str:
    return "ok" if status < 400 else "client_error" if status < 500 else "server_error"


class RequireKey:
    """Answers 401 unless the request carries the key as a bearer token; compares in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        response = http_error_response(
            401,
            "wrong or missing API key; send the header Authorization: Bearer KEY",
            {"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip(" \t").encode("latin-1"), self._key)


class LimitBody:
    """Answers 413 to a body over `max_bytes`: at once when its length is announced, else when it gets there."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            error = self._refusal()
            await http_error_response(413, error.detail, error.headers)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> HTTPException:
        # The rest of the body stays unread, so the connection cannot carry another request.
        text = f"the request body is over {self._max_bytes} bytes; the server takes no more (--max-body-bytes)"
        return HTTPException(413, text, {"Connection": "close"})
