"""Real sockets: hanging up, failures in the middle of a stream, many clients, starting and stopping."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from running_server import CHAT, COMPLETIONS, HELLO, Live

from lockstep.config.components import ServerOptions
from lockstep.core.errors import ConfigError
from lockstep.core.output import RequestOutput
from lockstep.server.replies.native import NativeReply
from lockstep.server.serve import bind, serve

pytestmark = pytest.mark.suite("cpu")

LONG = "x" * 3000
Start = Callable[..., Live]


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def data_lines(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line)


def test_text_arrives_while_it_is_made(live: Start) -> None:
    server = live(FakeClient(answer=lambda r, i: "abcd", delay_s=0.15))
    body = {"messages": HELLO, "stream": True}
    with httpx.stream("POST", server.url + CHAT, json=body) as response:
        lines = data_lines(response)
        times = [time.monotonic() for line in lines if '"content":"' in line and '"role"' not in line]
    assert len(times) == 4
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(times))


BODIES = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": ["a", "b", "c"], "max_tokens": 2000},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2000}},
}


@pytest.mark.parametrize("path", list(BODIES))
def test_hanging_up_a_stream_aborts(live: Start, path: str) -> None:
    server = live(FakeClient(answer=lambda r, i: LONG, delay_s=0.005))
    with httpx.stream("POST", server.url + path, json=BODIES[path] | {"stream": True}) as response:
        lines = data_lines(response)  # kept: a forgotten iterator would hang up
        next(lines)
        assert server.client.running
    wait_until(lambda: not server.client.running)
    assert len(server.client.closed_early) == len(server.client.requests)
    outcome = f'lockstep_requests_total{{endpoint="{path}",outcome="disconnected"}} 1.0'
    wait_until(lambda: outcome in httpx.get(server.url + "/metrics").text)


@pytest.mark.parametrize("path", list(BODIES))
def test_hanging_up_before_the_answer_aborts(live: Start, path: str) -> None:
    server = live(FakeClient(answer=lambda r, i: LONG, delay_s=0.005))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=BODIES[path], timeout=0.4)
    assert server.client.requests
    wait_until(lambda: not server.client.running)
    assert len(server.client.closed_early) == len(server.client.requests)


def test_sixty_clients_hang_up_and_others_do_not_notice(live: Start) -> None:
    server = live(FakeClient(answer=lambda r, i: LONG[: r.params.max_tokens], delay_s=0.002))

    async def visit(http: httpx.AsyncClient, leaves: bool) -> int:
        body = {"prompt": "a", "stream": True, "max_tokens": 2900 if leaves else 60}
        count = 0
        async with http.stream("POST", server.url + COMPLETIONS, json=body) as response:
            async for line in response.aiter_lines():
                count += line.startswith("data: {")
                if leaves and count == 3:
                    break
        return count

    async def crowd() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:
            return await asyncio.gather(*(visit(http, leaves=number % 5 != 0) for number in range(75)))

    counts = asyncio.run(crowd())
    assert [count for number, count in enumerate(counts) if number % 5 == 0] == [60] * 15
    wait_until(lambda: not server.client.running)
    assert len(server.client.closed_early) == 60


def test_failure_in_the_middle_is_an_event(live: Start) -> None:
    server = live(FakeClient(die_after=3))
    with httpx.stream("POST", server.url + CHAT, json={"messages": HELLO, "stream": True}) as response:
        assert response.status_code == 200
        lines = list(data_lines(response))
    assert json.loads(lines[-1])["error"]["code"] == "engine_dead"
    assert "[DONE]" not in lines
    assert [json.loads(line)["choices"][0]["delta"].get("content") for line in lines[1:-1]] == ["H", "e", "l"]
    metrics = httpx.get(server.url + "/metrics").text
    assert f'lockstep_requests_total{{endpoint="{CHAT}",outcome="server_error"}} 1.0' in metrics


def test_a_fault_in_the_middle_is_an_event(
    live: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of the server itself, too: the client learns that the answer is not whole."""
    whole = NativeReply.events
    told: list[int] = []

    def faulty(reply: NativeReply, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        told.append(index)
        if len(told) == 3:
            raise ZeroDivisionError
        return whole(reply, index, output)

    monkeypatch.setattr(NativeReply, "events", faulty)
    server = live()
    with httpx.stream("POST", server.url + "/generate", json={"text": "a", "stream": True}) as response:
        lines = list(data_lines(response))
    assert len(lines) == 3 and json.loads(lines[-1])["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text
    wait_until(lambda: not server.client.running)
    assert 'endpoint="/generate",outcome="server_error"} 1.0' in httpx.get(server.url + "/metrics").text


def test_abort_by_id_and_all(live: Start) -> None:
    server = live(FakeClient(answer=lambda r, i: LONG, delay_s=0.01))
    results: list[dict[str, Any]] = []

    def visit(**fields: Any) -> threading.Thread:
        body = {"prompt": ["a", "b"], "max_tokens": 2000} | fields
        thread = threading.Thread(
            target=lambda: results.append(httpx.post(server.url + COMPLETIONS, json=body, timeout=30).json())
        )
        thread.start()
        return thread

    def abort(**body: Any) -> dict[str, Any]:
        return httpx.post(server.url + "/abort_request", json=body).json()

    first = visit(request_id="mine")
    wait_until(lambda: len(server.client.running) == 2)
    assert abort(rid="other") == {"num_aborted": 0}
    assert abort(rid="mine") == {"num_aborted": 2}
    first.join(10)
    assert [choice["finish_reason"] for choice in results[0]["choices"]] == ["abort", "abort"]
    second = visit(prompt=[str(number) for number in range(70)])  # more than run at once
    wait_until(lambda: len(server.client.running) == 64)
    assert abort(abort_all=True) == {"num_aborted": 64}
    second.join(10)
    assert [choice["finish_reason"] for choice in results[1]["choices"]] == ["abort"] * 70


def post_raw(server: Live, head: str, body: bytes = b"") -> bytes:
    """Sends bytes as they are; returns what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


def test_announced_body_over_the_limit_is_refused_unread(live: Start) -> None:
    server = live(max_body_bytes=2000)
    answer = post_raw(server, "Content-Type: application/json\r\nContent-Length: 99999999999")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer
    assert b"--max-body-bytes" in answer
    assert httpx.get(server.url + "/health").status_code == 200


def test_chunked_body_over_the_limit_is_refused(live: Start) -> None:
    server = live(max_body_bytes=2000)
    chunk = b"400\r\n" + b"x" * 0x400 + b"\r\n"
    answer = post_raw(server, "Content-Type: application/json\r\nTransfer-Encoding: chunked", chunk * 4)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer


def test_body_at_the_limit_is_taken(live: Start) -> None:
    body = json.dumps({"prompt": "x" * 1000}).encode()
    server = live(max_body_bytes=len(body))
    headers = {"content-type": "application/json"}
    assert httpx.post(server.url + COMPLETIONS, content=body, headers=headers).status_code == 200
    assert httpx.post(server.url + COMPLETIONS, content=body + b" ", headers=headers).status_code == 413


def test_port_in_use_is_one_line() -> None:
    with (
        bind("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match=r"in use; choose another with --port") as found,
    ):
        bind("127.0.0.1", taken.getsockname()[1])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.host.invalid", 0), ("203.0.113.7", 0), ("127.0.0.1", 99999)]
)
def test_impossible_addresses(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        bind(host, port)


def test_client_that_cannot_start_is_closed() -> None:
    class Broken(FakeClient):
        async def start(self) -> None:
            raise ConfigError("no such model")

    client = Broken()
    with pytest.raises(ConfigError, match="no such model"):
        asyncio.run(serve(client, ServerOptions(port=0)))
    assert client.closed


SCRIPT = """
import asyncio, sys
from fake_client import FakeClient
from lockstep.config.components import ServerOptions
from lockstep.server.serve import serve

class Slow(FakeClient):
    async def start(self):
        if "slow" in sys.argv:
            print("loading", flush=True)
            await asyncio.sleep(60)
    async def close(self):
        print("closed", flush=True)
        await super().close()

client = Slow(answer=lambda r, i: "x" * 3000, delay_s=0.01)
options = ServerOptions(port=0, log_level="error")
asyncio.run(serve(client, options, on_ready=lambda url: print(url, flush=True)))
print("ended", flush=True)
"""


@contextlib.contextmanager
def server_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_streams_and_closes_the_engine(number: signal.Signals) -> None:
    with server_process() as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as response:
            lines = data_lines(response)
            next(lines)
            process.send_signal(number)
            rest = list(lines)
        error = json.loads(rest[-1])["error"]
        assert (error["code"], error["type"]) == ("engine_dead", "server_error")
        assert not any('"finish_reason":"abort"' in line for line in rest)
        assert process.wait(10) == 0
        assert process.stdout.read().split() == ["closed", "closed", "ended"]


def test_signal_while_loading() -> None:
    with server_process("slow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.terminate()
        assert process.wait(10) == 0
        assert process.stdout.read().split() == ["closed", "ended"]
