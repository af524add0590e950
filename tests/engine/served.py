"""`lockstep serve` as a process of its own, with everything that it could leave behind in sight."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

COMMAND = (sys.executable, "-m", "lockstep.cli.main", "serve", "--port", "0")
NULL = ("--device", "null")
REAL = ("--device", "cpu", "--threads", "1")
START_S = 60.0
LONG = 8000
"""Tokens of an answer that even the null device takes a while for; nearly the embedded model's context."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what would change the server's options."""
    return {k: v for k, v in os.environ.items() if not k.startswith("LOCKSTEP_")} | extra


class Served:
    """A running server. Its private folders go to `folder`/tmp, its messages to `folder`/stderr."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True, exist_ok=True)
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean_environment(TMPDIR=str(self.tmp), PYTHONUNBUFFERED="1"),
            )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline()
        assert " at http://" in announced, self.stderr.read_text()[-300:]
        self.url = announced.split(" at ")[1].strip()
        self.port = int(self.url.rsplit(":", 1)[1])
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.family = self.descendants()

    def descendants(self) -> list[psutil.Process]:
        """Engine and worker processes that live now."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def engines(self) -> list[psutil.Process]:
        """Engine processes, which are the server's own children."""
        return _running("lockstep.engine.engine_main", self.descendants())

    def workers(self) -> list[psutil.Process]:
        """Processes of further ranks."""
        return _running("lockstep.engine.worker_main", self.descendants())

    def load(self) -> dict[str, Any]:
        """The figures of /v1/loads."""
        answer = self.http.get("/v1/loads")
        assert answer.status_code == 200, answer.text
        (load,) = answer.json()["loads"]
        return load

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, no page is in use."""
        load = self.load()
        return not (load["num_running_reqs"] or load["num_waiting_reqs"] or load["num_used_tokens"])

    def answers(self) -> bool:
        """Whether the server completes a request now."""
        body = {"prompt": "a", "max_tokens": 1}
        return self.http.post(COMPLETIONS, json=body).status_code == 200

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Sends the signal; the exit code, and the seconds until the process was gone."""
        begin_s = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.http.close()
        return code, time.monotonic() - begin_s

    def put_away(self) -> None:
        """Ends whatever still lives, however the test went."""
        left = [*self.family, *self.descendants()]
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.http.close()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def remains(self) -> dict[str, Any]:
        """What a server that is gone has left: processes, files in its temporary folder, an open port."""
        probe = socket.socket()
        probe.settimeout(1)
        try:
            is_open = probe.connect_ex(("127.0.0.1", self.port)) == 0
        finally:
            probe.close()
        found = {
            "processes": [process.pid for process in self.family if is_live(process)],
            "files": [str(path) for path in self.tmp.rglob("*")],
            "port": [self.port] if is_open else [],
        }
        return {kind: things for kind, things in found.items() if things}


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Served]:
    """A server that is stopped and checked for remains, unless the test ended it itself."""
    server = Served(folder, *options)
    try:
        yield server
        if server.process.poll() is None:
            code, _ = server.stop()
            assert code == 0, server.stderr.read_text()
            assert not (remains := server.remains()), remains
    finally:
        server.put_away()


def is_live(process: psutil.Process) -> bool:
    """False once it has ended, also while nobody has asked for its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], bool], within_s: float, every_s: float = 0.05) -> float:
    """Seconds until the condition held; fails after `within_s`."""
    begin_s = time.monotonic()
    while True:
        holds = condition()
        took_s = time.monotonic() - begin_s
        if holds:
            return took_s
        assert took_s < within_s, f"not so after {within_s} s"
        time.sleep(every_s)


def events_in(text: str) -> list[Any]:
    """The payloads of server-sent events, "[DONE]" as it is."""
    payloads = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def _running(module: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if module in process.cmdline() and is_live(process):
                found.append(process)
        except psutil.Error:
            pass
    return found
