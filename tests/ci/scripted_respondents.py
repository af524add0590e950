"""Respondents whose answers are known: in this process, and behind an OpenAI-shaped HTTP server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lockstep.ci.gates.asking import Reply

EXCERPT = Path(__file__).parent / "gsm8k"
Speaker = Callable[[str], str]
"""The last question of a prompt -> what is said to it."""


def last_question(prompt: str) -> str:
    """The question that a prompt ends with."""
    return prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")


def knows(*, wrong_about: Callable[[str], bool] = lambda question: False) -> Speaker:
    """Says the right number of every question of the excerpt but those that it is wrong about."""
    rows = [json.loads(line) for line in (EXCERPT / "test.jsonl").read_text("utf-8").splitlines()]
    answers = {row["question"].strip(): row["answer"].rpartition("####")[2].strip() for row in rows}
    return lambda question: "#### -12345" if wrong_about(question) else f" Hence.\n#### {answers[question]}"


class ScriptedRespondent:
    """Says what its speaker says, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self.prompts: list[str] = []

    def ask(self, prompt: str, *, max_tokens: int, stop: str) -> Reply:
        self.prompts.append(prompt)
        return Reply(self._speaker(last_question(prompt)), cut=False)


class ScriptedServer(ThreadingHTTPServer):
    """/v1/models and /v1/completions. `failure`, when set, is the status of every completion."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, speaker: Speaker) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.speaker = speaker
        self.api_key: str | None = None
        self.failure: int | None = None
        self.reply: dict[str, Any] | None = None
        self.pause_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def counted(self, body: dict[str, Any]) -> Iterator[None]:
        with self._lock:
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def scripted_server(speaker: Speaker) -> Iterator[ScriptedServer]:
    """A server in a thread of its own, gone at the end."""
    with ScriptedServer(speaker) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        if self.server.api_key and self.headers.get("Authorization") != f"Bearer {self.server.api_key}":
            self._say(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models":
            self._say(200, {"data": [{"id": "small"}, {"id": "large"}]})
        else:
            self._say(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # Counted until the reply is sent, not longer: the client may ask again before this thread goes on.
        with self.server.counted(body):
            time.sleep(self.server.pause_s)
            text = self.server.speaker(last_question(body["prompt"]))
        if self.server.failure is not None:
            self._say(self.server.failure, {"error": {"message": "the queue is full"}})
        else:
            self._say(200, self.server.reply or {"choices": [{"text": text, "finish_reason": "stop"}]})

    def _say(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""
