"""Two ways to reach a server in tests: an app called in process, and a real one on a socket in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
from fake_client import FakeClient

from lockstep.config.components import ServerOptions
from lockstep.server.app import create_app
from lockstep.server.serve import bind, run_app, url_of

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hi"}]


def events_of(response: httpx.Response) -> list[Any]:
    """The payloads of a finished stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


class InProcess:
    """Sends requests to an app without a socket."""

    def __init__(self, client: FakeClient, **options: Any) -> None:
        self.client = client
        self.app = create_app(client, ServerOptions(**options))

    def send(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                return await http.request(method, path, **given)

        return asyncio.run(go())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.send("POST", path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.send("GET", path)


class Live:
    """A server on a free port, in a thread with its own event loop."""

    def __init__(self, client: FakeClient, **options: Any) -> None:
        self.client = client
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = url_of(self._listener)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        app = create_app(client, ServerOptions(**options))
        serving = run_app(app, self._listener, self._stop, client, log_level="error")
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serving,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(15)
        assert not self._thread.is_alive(), "the server did not stop"
        self._loop.close()
