"""Listening: the socket, the signals, and the order in which engine and server start and stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from lockstep.config.components import ServerOptions
from lockstep.core.errors import ConfigError
from lockstep.engine.client import EngineClient
from lockstep.server.app import create_app

GRACE_S = 5
"""Time that open connections get to end once their requests have ended."""

BACKLOG = 2048

log = logging.getLogger(__name__)

_UVICORN_LEVELS = {"debug": "info", "info": "warning"}
"""uvicorn's news (each request, each start) are details here; the address is announced by `on_ready`."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, the protocol is that of accepted sockets too: asyncio switches Nagle's delay off only then.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use; choose another with --port, or 0 for a free one"
            ) from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a listening socket, as a user types it into a browser."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


class _Server(uvicorn.Server):
    """uvicorn, with signals left to `serve`: uvicorn raises them again, which would skip closing the engine."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _is_news(record: logging.LogRecord) -> bool:
    """False for what asyncio says when several events follow a hang-up before the loop learns of it, and for what
    uvicorn says of a connection that it cut off itself."""
    was_cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not was_cut and record.getMessage() != "socket.send() raised exception."


async def serve(
    client: EngineClient, options: ServerOptions, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Listens, starts the client, serves until SIGINT or SIGTERM, closes the client, which ends what runs.

    The port is taken first, so that a taken one is known before a model loads. `on_ready` gets the address.
    Raises ConfigError and whatever `client.start` raises.
    """
    listener = bind(options.host, options.port)
    try:
        await _serve_on(listener, client, options, on_ready)
    finally:
        listener.close()


async def _serve_on(
    listener: socket.socket,
    client: EngineClient,
    options: ServerOptions,
    on_ready: Callable[[str], None] | None,
) -> None:
    app = create_app(client, options)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        if not await _unless_stopped(stop, client):
            return
        if on_ready:
            on_ready(url_of(listener))
        await run_app(app, listener, stop, client, log_level=options.log_level)
    finally:
        await client.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _unless_stopped(stop: asyncio.Event, client: EngineClient) -> bool:
    """Starts the client; False when a signal came first."""
    starting = asyncio.ensure_future(client.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return False
    starting.result()
    return True


async def run_app(
    app: FastAPI, listener: socket.socket, stop: asyncio.Event, client: EngineClient, *, log_level: str = "info"
) -> None:
    """Serves the app on the socket until `stop` is set, then closes the client, so that running requests end with
    its error; whoever reads no further is cut off after 5 s."""
    config = uvicorn.Config(
        app,
        log_level=_UVICORN_LEVELS.get(log_level, log_level),
        timeout_graceful_shutdown=GRACE_S,
        lifespan="off",
        server_header=False,
    )
    server = _Server(config)
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(_is_news)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            num_unfinished = app.state.gateway.num_running
            log.warning(
                "stopping%s",
                f"; {num_unfinished} unfinished requests end with an error" if num_unfinished else "",
            )
            server.should_exit = True
            await client.close()
        await serving
    finally:
        stopping.cancel()
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
