"""A server of OpenAI-shaped completion streams with known pauses, on the standard library alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeCompletions(ThreadingHTTPServer):
    """Says one `letter` per token: the first after `first_s`, the next after `gap_s` each.

    A prompt of the single token `fails_on` gets `failure`: "status", "event" (an error in the stream), "cut" (no
    [DONE]) or "json" (an event that is not JSON). `most_at_once` is how many streams ran at the same time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, first_s: float = 0.0, gap_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.first_s, self.gap_s = first_s, gap_s
        self.letter = "a"
        self.api_key: str | None = None
        self.vocab_size: int | None = 50
        self.fails_on, self.failure = -1, ""
        self.bodies: list[dict[str, Any]] = []
        self.arrived_s: list[float] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def counted(self, body: dict[str, Any]) -> Iterator[None]:
        with self._lock:
            self.bodies.append(body)
            self.arrived_s.append(time.perf_counter())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        yield
        with self._lock:
            self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    server: FakeCompletions

    def do_GET(self) -> None:
        if self.server.api_key and self.headers.get("Authorization") != f"Bearer {self.server.api_key}":
            self._json(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": "fake"}]})
        elif self.path == "/model_info" and self.server.vocab_size is not None:
            self._json(200, {"vocab_size": self.server.vocab_size})
        else:
            self._json(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counted(body):
            failing = body["prompt"] == [self.server.fails_on]
            if failing and self.server.failure == "status":
                self._json(503, {"error": {"message": "the queue is full"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            time.sleep(self.server.first_s)
            self._stream(body, self.server.failure if failing else "")

    def _stream(self, body: dict[str, Any], failure: str) -> None:
        count = body["max_tokens"]
        for index in range(count):
            if index:
                time.sleep(self.server.gap_s)
            last = index == count - 1
            self._event(
                {"choices": [{"text": self.server.letter, "finish_reason": "length" if last else None}]}
            )
            if failure == "event":
                self._event({"error": {"message": "the engine died"}})
                return
            if failure == "json":
                self._send("data: {")
                return
            if failure == "cut":
                return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self._event({"choices": [], "usage": usage})
        self._send("data: [DONE]")

    def _event(self, value: dict[str, Any]) -> None:
        self._send(f"data: {json.dumps(value, ensure_ascii=False)}")

    def _send(self, text: str) -> None:
        self.wfile.write(f"{text}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""
