"""Further ranks: one process each, started, fed and watched by the first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from lockstep.config import EngineConfig
from lockstep.core.errors import EngineDead
from lockstep.engine.messages import Failed, Ready, StepInputs, WorkerSpec, decode_event, encode

START_TIMEOUT_S = 300.0
SEND_TIMEOUT_S = 0.2
NOTICED_S = 3.0
"""Time in which the first rank should have seen by itself that a worker is gone."""


class Ranks:
    """Worker processes of ranks 1.. and the sockets to them.

    A worker lives no longer than this process: it reads its standard input, which ends with us. Owned by the
    first rank; `close` ends every worker.
    """

    def __init__(self, config: EngineConfig, run_dir: Path) -> None:
        self._context = zmq.Context()
        self._run_dir = run_dir
        self.store = run_dir / "rendezvous"
        self._inputs: list[zmq.Socket[bytes]] = []
        self._workers: list[subprocess.Popen[bytes]] = []
        self._closing = threading.Event()
        self._last_word = ""
        self._events: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        events_address = f"ipc://{run_dir}/ranks-events"
        self._events.bind(events_address)
        for rank in range(1, config.parallel.num_ranks):
            socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
            socket.sndtimeo = int(SEND_TIMEOUT_S * 1000)
            address = f"ipc://{run_dir}/rank-{rank}"
            socket.bind(address)
            self._inputs.append(socket)
            spec = WorkerSpec(config, rank, address, events_address, str(self.store))
            self._workers.append(start_process("lockstep.engine.worker_main", spec))

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when every worker is built. Raises EngineDead with the reason when one is not."""
        missing = len(self._workers)
        waited_s = 0.0
        while missing:
            if self._events.poll(200):
                event = decode_event(self._events.recv())
                if isinstance(event, Failed):
                    raise EngineDead(f"a worker could not start: {event.message}")
                if isinstance(event, Ready):
                    missing -= 1
                continue
            self.check()
            waited_s += 0.2
            if waited_s > timeout_s:
                raise EngineDead(f"{missing} worker(s) were not ready after {timeout_s:.0f} s")

    def send(self, inputs: StepInputs) -> None:
        """The inputs of the next step, to every worker. Raises EngineDead when one has died."""
        self.check()
        data = encode(inputs)
        for socket in self._inputs:
            self._send(socket, data)

    def check(self, patience_s: float = 0.0) -> None:
        """Raises EngineDead when a worker is gone, or goes in this time, with its last word if it left one."""
        until_s = time.monotonic() + patience_s
        while True:
            for rank, worker in enumerate(self._workers, 1):
                if worker.poll() is not None:
                    raise EngineDead(self._obituary(rank, worker.returncode))
            if time.monotonic() >= until_s:
                return
            time.sleep(0.02)

    def watch(self, break_off: Callable[[], None]) -> None:
        """From now on `break_off` is called, in a thread of its own, when a worker's end went unnoticed for a while.

        A device may wait for a peer that is gone without end, and the first rank for its device.
        """
        threading.Thread(target=self._watch, args=(break_off,), name="watch ranks", daemon=True).start()

    def _watch(self, break_off: Callable[[], None]) -> None:
        workers = tuple(self._workers)
        while all(worker.poll() is None for worker in workers):
            if self._closing.wait(0.5):
                return
        if not self._closing.wait(NOTICED_S):
            break_off()

    def _send(self, socket: zmq.Socket[bytes], data: bytes) -> None:
        while True:
            try:
                return socket.send(data)
            except zmq.Again:  # its queue is full, or nobody is at its other end any more
                self.check()

    def _obituary(self, rank: int, code: int) -> str:
        if self._events.poll(0):
            event = decode_event(self._events.recv())
            self._last_word = f": {event.message}" if isinstance(event, Failed) else ""
        return f"the worker process of rank {rank} ended with code {code}{self._last_word}"

    def close(self) -> None:
        """Ends the workers and waits for them. May be called twice."""
        self._closing.set()
        for worker in self._workers:
            end_process(worker)
        for socket in (*self._inputs, self._events):
            socket.close(linger=0)
        self._context.term()
        self._workers, self._inputs = [], []


def start_process(module: str, spec: msgspec.Struct) -> subprocess.Popen[bytes]:
    """Runs a module of this package in a new process that gets `spec` as its first input line.

    The pipe stays open as the child's lifeline. The child is out of reach of the terminal's Ctrl-C.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(spec) + b"\n")
    process.stdin.flush()
    return process


def end_process(process: subprocess.Popen[bytes], patience_s: float = 5.0) -> None:
    """Cuts the lifeline and waits; kills a process that does not leave."""
    if process.stdin is not None:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def follow_lifeline(run_dir: Path) -> None:
    """Ends this process as soon as the one that started it is gone or lets go.

    `run_dir` is that one's private folder; killed, it could not remove it, so this process does.
    """

    def watch() -> None:
        # The bare descriptor: a buffered reader would hold a lock that the interpreter wants when it ends.
        while os.read(0, 4096):
            pass
        shutil.rmtree(run_dir, ignore_errors=True)
        # The main thread may be inside a collective that waits for a peer that is gone: nothing else ends that.
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def new_run_dir() -> tempfile.TemporaryDirectory[str]:
    """A private folder for sockets and the rendezvous file; only this user may enter.

    Its owner removes it; when its owner is killed, the processes that the owner started do (`follow_lifeline`).
    """
    return tempfile.TemporaryDirectory(prefix="lockstep-", ignore_cleanup_errors=True)
