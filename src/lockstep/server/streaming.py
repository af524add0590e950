"""A response of server-sent events, and what becomes of it when the engine fails or the client hangs up."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lockstep.core.errors import InvalidRequest, LockstepError
from lockstep.server.errors import INTERNAL_ERROR, body_of, error_body, response_of
from lockstep.server.wire import DONE_EVENT, OUTCOME, SEND_BODY, ClientDisconnected, events, until_disconnect

log = logging.getLogger(__name__)


class EventStream(Response):
    """Server-sent events, some in each piece, from an async generator, which is closed when the client hangs up.

    The status line waits for the first event: an error before it is an ordinary error response; an error
    after it is sent as an event, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(scope, receive, send))
        except ClientDisconnected:
            scope[OUTCOME] = "disconnected"

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        send_body: Send = scope.get(SEND_BODY, send)
        started = False
        async with aclosing(self._pieces) as pieces:
            try:
                async for piece in pieces:
                    if not started:
                        await send(head)
                        started = True
                    await send_body(_piece(piece))
                last = DONE_EVENT
            except LockstepError as error:
                if not started:
                    await response_of(error)(scope, receive, send)
                    return
                scope[OUTCOME] = "client_error" if isinstance(error, InvalidRequest) else "server_error"
                last = events([body_of(error)])
            except Exception:
                if not started:
                    raise
                log.exception("a stream ended early")
                scope[OUTCOME] = "server_error"
                last = events([error_body(500, INTERNAL_ERROR)])
        await send_body(_piece(last, more=False))


def _piece(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
