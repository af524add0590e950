"""The HTTP application over one engine client."""

from __future__ import annotations

from fastapi import FastAPI

import lockstep
from lockstep.config.components import ServerOptions
from lockstep.core.errors import ConfigError
from lockstep.engine.client import EngineClient
from lockstep.server.errors import install_error_handlers
from lockstep.server.gateway import Gateway
from lockstep.server.metrics import Metrics
from lockstep.server.middleware import CountRequests, LimitBody, RequireKey
from lockstep.server.routes import chat, completions, embeddings, models, native, operations, page
from lockstep.server.tools.registry import choose_reader

ROUTERS = tuple(family.router for family in (chat, completions, embeddings, models, native, operations, page))


def create_app(client: EngineClient, options: ServerOptions) -> FastAPI:
    """All endpoints over a client that somebody else starts and closes; several apps may share a process.

    Raises ConfigError for an unknown tool call parser and for an API key that says nothing.
    """
    if options.api_key is not None and not options.api_key.strip():
        raise ConfigError("--api-key (LOCKSTEP_API_KEY) is empty; give a key, or leave it out to ask for none")
    choose_reader(options.tool_call_parser, None)
    metrics = Metrics()
    # The generated documentation pages load scripts from a foreign network; the schema itself stays.
    app = FastAPI(
        title="Lockstep", version=lockstep.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.gateway = Gateway(client, options, metrics)
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(LimitBody, max_bytes=options.max_body_bytes)
    if options.api_key is not None:
        app.add_middleware(RequireKey, api_key=options.api_key)
    app.add_middleware(CountRequests, metrics=metrics)
    return app
