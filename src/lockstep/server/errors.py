"""Every error leaves the server in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import difflib
import http
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lockstep.core.errors import EngineDead, InvalidRequest, LockstepError, QueueFull, nearest
from lockstep.server.wire import OUTCOME, ClientDisconnected, JsonResponse

RESTART_RETRY_S = 5.0
"""Advice to clients that met a dead engine: about the time a small model needs to load again."""

CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody is there to read it."""

_HTTP_CODES = {
    400: "invalid_json",
    401: "invalid_api_key",
    404: "unknown_path",
    405: "method_not_allowed",
    413: "body_too_large",
}
_LONGEST_MESSAGE, _LONGEST_PARAM = 2000, 200
"""Characters of an error: what it quotes of a request may be as long as a body is."""

_UNION_TAG = re.compile(r"(str|int|bool|float|NamedToolChoice|AllowedToolsChoice|[a-z-]+\[.*\])$")
"""What pydantic puts into a location for the member of a union that it tried."""

INTERNAL_ERROR = "internal error; the server's log has the details"

log = logging.getLogger(__name__)


class GenerationFailed(LockstepError):
    """The engine ended a request with an error; other requests are not affected."""


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        hint = nearest(name, [served]) or f"; this server serves {served!r}"
        super().__init__(f"unknown model {name!r}{hint}", param="model", code="model_not_found")


def status_of(error: LockstepError) -> int:
    """The HTTP status that says what kind of failure this is."""
    if isinstance(error, UnknownModel):
        return 404
    if isinstance(error, InvalidRequest):
        return 400
    if isinstance(error, (QueueFull, EngineDead)):
        return 503
    return 500


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The JSON object of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message, param = _printable(message, _LONGEST_MESSAGE), param and _printable(param, _LONGEST_PARAM)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _printable(text: str, longest: int) -> str:
    """Half of a surrogate pair, quoted from a bad request, cannot be sent back as it is; both ends say what it is."""
    if len(text) > longest:
        text = f"{text[: longest - 100]} ... {text[-95:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def body_of(error: LockstepError) -> dict[str, dict[str, str | None]]:
    """The JSON object of one of our own errors, for a response or for an event in a stream."""
    if isinstance(error, InvalidRequest):
        return error_body(status_of(error), str(error), param=error.param, code=error.code)
    codes: dict[type, str] = {QueueFull: "queue_full", EngineDead: "engine_dead"}
    return error_body(status_of(error), str(error), code=codes.get(type(error), "generation_failed"))


def response_of(error: LockstepError) -> Response:
    """The response for one of our own errors; 503 says when to try again."""
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, EngineDead):
        headers["Retry-After"] = str(math.ceil(RESTART_RETRY_S))
    return JsonResponse(body_of(error), status_of(error), headers)


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response for a failure of HTTP itself: path, method, key, size."""
    return JsonResponse(error_body(status, message, code=_HTTP_CODES.get(status)), status, headers)


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The most specific of pydantic's complaints as one line that names the field as the client wrote it."""
    error = max(errors, key=lambda found: len(found["loc"]))
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        where = f" at character {error['loc'][-1]}" if isinstance(error["loc"][-1], int) else ""
        return InvalidRequest(f"the body is not valid JSON{where}: {context.get('error')}", code="invalid_json")
    path = [part for part in error["loc"][1:] if isinstance(part, int) or not _UNION_TAG.match(part)]
    if not path and error["type"] in ("missing", "model_attributes_type", "model_type"):
        return InvalidRequest(
            "the body must be a JSON object, sent with the header Content-Type: application/json",
            code="invalid_json",
        )
    param = _dotted([*path, context["field"]] if "field" in context else path)
    if error["type"] == "unknown_field":
        return InvalidRequest(f"unknown field {param!r}{context['hint']}", param=param, code="unknown_field")
    message = str(error["msg"])
    return InvalidRequest(
        f"{param}: {message[:1].lower()}{message[1:]}" if param else message, param=param or None
    )


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


async def _on_lockstep_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LockstepError)
    return response_of(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return response_of(explain_validation(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = (
            f"no such path: {request.url.path}{_nearest_path(request.url.path, request.app.openapi()['paths'])}"
        )
    elif error.status_code == 400:
        message = _why_not_read(error.__cause__ or error.__context__)
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}"
    else:
        message = str(error.detail) or http.HTTPStatus(error.status_code).phrase
    return http_error_response(error.status_code, message, error.headers)


def _why_not_read(cause: BaseException | None) -> str:
    """What a body is that is neither JSON nor a mistake in JSON."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: byte {cause.start} begins no character"
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    return "the body is not JSON in UTF-8, or it is nested too deeply"


def _nearest_path(path: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean '/v1/models'?``, or an empty string. That paths share ``/v1`` says nothing."""
    by_tail = {each.removeprefix("/v1"): each for each in known}
    found = difflib.get_close_matches(path.removeprefix("/v1"), by_tail, n=1, cutoff=0.7)
    return f"; did you mean {by_tail[found[0]]!r}?" if found else ""


async def _on_surrogate(request: Request, error: Exception) -> Response:
    return response_of(InvalidRequest("a text holds half of a surrogate pair, which is not Unicode"))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    request.scope[OUTCOME] = "disconnected"
    return Response(status_code=CLIENT_CLOSED)


async def _on_bug(request: Request, error: Exception) -> Response:
    return http_error_response(500, INTERNAL_ERROR)


def install_error_handlers(app: FastAPI) -> None:
    """Gives every kind of failure its response."""
    app.add_exception_handler(LockstepError, _on_lockstep_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(UnicodeEncodeError, _on_surrogate)
    app.add_exception_handler(ClientDisconnected, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
