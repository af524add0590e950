"""Lockstep in this process, fed token ids, and a limit on what it may take."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from lockstep.bench.workload import Job
from lockstep.core.errors import LockstepError
from lockstep.core.sampling import SamplingParams

if TYPE_CHECKING:
    from lockstep import LLM

HUNG_GRACE_S = 20.0
HUNG_EXIT_CODE = 70
"""Of a process that ended itself: a device that never answers cannot be interrupted."""


class OutOfTime(LockstepError):
    """A test took longer than it may."""


class Engine(Protocol):
    """Whoever runs workloads."""

    def generate(self, jobs: Sequence[Job], temperature: float = 0.0) -> float:
        """Seconds from the call to the last token of the last job."""
        ...

    def flush(self) -> None:
        """Forgets cached prefixes."""
        ...


class InProcess:
    """`LLM`, made by `open_llm` when it is first needed. Greedy unless told otherwise; end tokens mean nothing."""

    def __init__(self, open_llm: Callable[[], LLM]) -> None:
        self._open_llm = open_llm
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            self._llm = self._open_llm()
        return self._llm

    def generate(self, jobs: Sequence[Job], temperature: float = 0.0) -> float:
        """Raises LockstepError when not every token came."""
        prompts = [job.prompt if isinstance(job.prompt, str) else list(job.prompt) for job in jobs]
        params = [
            SamplingParams(temperature=temperature, max_tokens=job.max_tokens, ignore_eos=True) for job in jobs
        ]
        begin_s = time.perf_counter()
        answers = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - begin_s
        lengths = [len(answer.token_ids) for answer in answers]
        if lengths != [job.max_tokens for job in jobs]:
            raise LockstepError(f"{sum(lengths)} tokens came of {sum(job.max_tokens for job in jobs)}")
        return seconds

    def flush(self) -> None:
        self.llm.flush_cache()

    def close(self) -> None:
        """Ends the engine and gives its memory back. The next use starts another. May be called twice."""
        if self._llm is None:
            return
        self._llm.close()
        self._llm = None
        gc.collect()
        _empty_device_cache()


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the main thread when what is inside takes longer; ends the process where that is no help."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    last_resort = threading.Timer(seconds + HUNG_GRACE_S, os._exit, [HUNG_EXIT_CODE])
    last_resort.daemon = True
    last_resort.start()
    try:
        yield
    finally:
        last_resort.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def process_started_s() -> float:
    """When this process began, in seconds since the epoch. Linux: from /proc; its manual page is proc_pid_stat(5)."""
    num_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + num_ticks / os.sysconf("SC_CLK_TCK")
