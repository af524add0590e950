"""A visit: one row measured once, in a process that lives no longer than that."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.bench.http_load import Exchange, LoadGenerator
from lockstep.bench.processes import running_server
from lockstep.bench.workload import Job
from lockstep.core.errors import LockstepError
from peers.environments import module_environment, run_module
from peers.files import BenchModel
from peers.machine import Processors, peak_rss_mb
from peers.peer import Answer
from peers.rows import COMMAND, SERVER, Row
from peers.worker import PROMPT
from peers.workload import WARM_UP_TOKENS, Workload

DECODE, FIRST_TOKEN, CONCURRENT, START, MEMORY = "decode", "first_token", "concurrent", "start", "memory"
PATIENCE_S = 240.0
"""After so long a visit has failed, and its process is killed."""


@dataclass
class Visit:
    """What one visit found: figure -> the values of its repeats. `lost_cores` were used by others meanwhile.

    Units: decode and concurrent in tokens/s, first_token in ms, start in s, memory in MB. `first_token_ids` are
    those of the concurrent prompts, to see that all rows ran the same model.
    """

    model: str
    row: str
    round_number: int
    values: dict[str, list[float]] = field(default_factory=dict)
    first_token_ids: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    lost_cores: float = 0.0
    seconds: float = 0.0
    error: str | None = None

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Visit:
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Visitor:
    """Measures rows of one model under one workload, on `threads` threads."""

    model: BenchModel
    workload: Workload
    threads: int
    cache: Path
    log: Path

    def visit(self, row: Row, round_number: int) -> Visit:
        """Measures; a peer that fails leaves its reason in `error` and what it had shown before."""
        found = Visit(self.model.name, row.name, round_number)
        file = str(self.model.files[row.format])
        before, begin_s = Processors.now(), time.perf_counter()
        try:
            if row.who == COMMAND:
                self._visit_command(file, found)
            elif row.who == SERVER:
                self._visit_server(file, found)
            else:
                self._visit_peer(row.who, file, found)
        except LockstepError as error:
            found.error = str(error)
        found.seconds = time.perf_counter() - begin_s
        found.lost_cores = Processors.now().lost_since(before) / found.seconds
        return found

    def _visit_peer(self, peer: str, file: str, found: Visit) -> None:
        asked, vocab_size, number = self.workload, self.model.vocab_size, found.round_number
        command = run_module(peer, self.cache, "peers.worker", peer, file, str(self.threads))
        with Worker.running(peer, command, self.log) as worker:
            found.values[START] = [worker.start_s]
            found.versions = worker.versions
            # Memory first: what answers leave behind in caches is not what sixteen requests need.
            prompts = asked.concurrent_prompts(vocab_size, number)
            worker.ask([prompt[-WARM_UP_TOKENS:] for prompt in prompts], WARM_UP_TOKENS)
            answer = worker.ask(prompts, asked.concurrent_tokens)
            found.values[CONCURRENT] = [answer.num_tokens / answer.seconds]
            found.values[MEMORY] = [sum(peak_rss_mb(worker.pid))]
            found.first_token_ids = answer.first_token_ids
            longs = [asked.long_prompt(vocab_size, number, repeat) for repeat in range(asked.repeats + 1)]
            firsts = [worker.ask([prompt], 1).first_token_s * 1e3 for prompt in longs]
            found.values[FIRST_TOKEN] = firsts[1:]
            shorts = [asked.decode_prompt(vocab_size, number, repeat) for repeat in range(asked.repeats + 1)]
            worker.ask([shorts[0]], WARM_UP_TOKENS)
            answers = [worker.ask([prompt], asked.decode_tokens + 1) for prompt in shorts[1:]]
            found.values[DECODE] = [decode_rate(one) for one in answers]

    def _visit_server(self, file: str, found: Visit) -> None:
        prompts = self.workload.concurrent_prompts(self.model.vocab_size, found.round_number)
        jobs = [Job(tuple(prompt), self.workload.concurrent_tokens) for prompt in prompts]
        warm_up = [Job(job.prompt[-WARM_UP_TOKENS:], WARM_UP_TOKENS) for job in jobs]
        command = [_lockstep(), "serve", f"--threads={self.threads}", "--port=0", "--", file]
        with running_server(command) as url:
            exchanges = asyncio.run(_load(url, warm_up, jobs))
            found.values[CONCURRENT] = [_served_rate(exchanges)]
            # This process has no other children while it visits a server.
            found.values[MEMORY] = [sum(peak_rss_mb(os.getpid())[1:])]

    def _visit_command(self, file: str, found: Visit) -> None:
        command = [_lockstep(), "run", "--json", "--max-tokens=1", f"--threads={self.threads}"]
        command += ["--", PROMPT, file]
        found.values[START] = [self._first_line_s(command) for _ in range(self.workload.repeats)]

    def _first_line_s(self, command: Sequence[str]) -> float:
        """Seconds from starting a process to its first line of output."""
        begin_s = time.perf_counter()
        with (
            self.log.open("a") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
            _patience(process),
        ):
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - begin_s
        if not line:
            raise LockstepError(f"{command[0]} ended without an answer; see {self.log}")
        return seconds


class Worker:
    """The process of `worker.py`, seen from here."""

    def __init__(self, process: subprocess.Popen[str], peer: str, log: Path) -> None:
        self._process, self._peer, self._log = process, peer, log
        self.pid = process.pid
        self.start_s = 0.0
        self.versions: dict[str, str] = {}

    @classmethod
    @contextmanager
    def running(cls, peer: str, command: Sequence[str], log: Path) -> Iterator[Worker]:
        """Starts it and waits until it is ready; ends it afterwards. Raises LockstepError when it dies or hangs."""
        begin_s = time.perf_counter()
        with (
            log.open("a") as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=module_environment(),
            ) as process,
            _patience(process),
        ):
            worker = cls(process, peer, log)
            worker.versions = worker._reply()["versions"]
            worker.start_s = time.perf_counter() - begin_s
            yield worker

    def ask(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answer:
        """The prompts' answer."""
        assert self._process.stdin is not None
        try:
            print(
                json.dumps({"prompts": prompts, "num_tokens": num_tokens}), file=self._process.stdin, flush=True
            )
        except BrokenPipeError:
            pass  # Reading tells it better.
        answer = Answer(**self._reply())
        if answer.num_tokens != len(prompts) * num_tokens:
            wanted = f"{len(prompts)} x {num_tokens}"
            raise LockstepError(f"{self._peer} answered {answer.num_tokens} tokens instead of {wanted}")
        return answer

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LockstepError(f"{self._peer} ended in the middle of its visit; see {self._log}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def decode_rate(answer: Answer) -> float:
    """Tokens per second after the first token of a single prompt."""
    return (answer.num_tokens - 1) / (answer.seconds - answer.first_token_s)


async def _load(url: str, warm_up: Sequence[Job], jobs: Sequence[Job]) -> list[Exchange]:
    async with LoadGenerator(url) as generator:
        model = (await generator.served_model()).name
        await generator.run(model, warm_up, concurrency=None)
        return await generator.run(model, jobs, concurrency=None)


def _served_rate(exchanges: Sequence[Exchange]) -> float:
    """Output tokens per second from the first request to the end of the last stream."""
    for one in exchanges:
        if one.error is not None:
            raise LockstepError(f"a request to the server failed: {one.error}")
    seconds = max(one.end_s for one in exchanges) - min(one.begin_s for one in exchanges)
    return sum(one.num_output_tokens for one in exchanges) / seconds


@contextmanager
def _patience(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills the process when it takes too long, and closes its stdin at the end so that it may leave."""
    timer = threading.Timer(PATIENCE_S, process.kill)
    timer.start()
    try:
        yield
    finally:
        if process.stdin is not None:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        process.wait()
        timer.cancel()


def _lockstep() -> str:
    return str(Path(sys.executable).with_name("lockstep"))
