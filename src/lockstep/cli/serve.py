"""`lockstep serve`: the HTTP server."""

from __future__ import annotations

import asyncio

import click

from lockstep.cli.answer import note
from lockstep.cli.options import SectionedCommand, server_options
from lockstep.config import Given, ServerOptions, gather, resolve_server

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command("serve", cls=SectionedCommand, short_help="Serve the model over HTTP.")
@server_options
def command(options: dict[str, Given]) -> None:
    """Serve MODEL over HTTP: the OpenAI API under /v1, a native API, metrics, and a page at /.

    Prints its address once the model answers. Ctrl-C or SIGTERM ends running requests and stops.

    \b
    lockstep serve
    lockstep serve path/to/model --host 0.0.0.0 --port 8000 --api-key KEY
    """
    server = resolve_server(gather(options))
    from lockstep.engine.process_client import ProcessClient
    from lockstep.server.serve import serve

    client = ProcessClient(options)

    def announce(url: str) -> None:
        click.echo(f"Lockstep serves {client.card.name} at {url}")
        if client.native_kernels is not None:
            note(client.native_kernels)
        _warn_when_open(server)

    asyncio.run(serve(client, server, on_ready=announce))


def _warn_when_open(server: ServerOptions) -> None:
    if server.api_key is None and server.host not in _LOOPBACK:
        note(f"anyone who reaches {server.host} may use it: --api-key or LOCKSTEP_API_KEY asks for a key")
