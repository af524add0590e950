"""Compiles in the background what bound kernels will call, so that steps of a new size need not wait for it."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lockstep.ops.contract import Kernel, Signature

_MOST_THREADS = 4
_CPUS_OF_THREAD = 4
"""One thread on a small machine: the engine that starts needs processors, too."""

_LOG = logging.getLogger(__name__)


class BackgroundCompiler:
    """Threads that fill the folder of compiled kernels for one device; with nothing left to compile, or nobody to call
    it, they end.

    A kernel that is wanted meanwhile is compiled by whoever comes first. A failure is told where the kernel is called.
    What the interpreter is needed for waits until the engine has `started`, and takes one thread.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._device = device
        self._folder = folder
        self._num_threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // _CPUS_OF_THREAD))
        self._works: deque[Callable[[], object]] = deque()
        self._idle: list[tuple[Callable[..., Any], Signature]] = []
        self._seen: set[tuple[str, str, tuple[tuple[str, Any], ...]]] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def add(self, kernel: Kernel, signature: Signature) -> None:
        """What calls of this signature may need; nothing for kernels that compile nothing of this kind."""
        if kernel.compile_later is None and kernel.compile_idle is None:
            return
        key = (kernel.op, kernel.provider, _key_of(signature))
        if key in self._seen:
            return
        self._seen.add(key)
        if kernel.compile_later is not None:
            self._put([partial(self._expand, kernel.compile_later, signature)])
        if kernel.compile_idle is not None:
            self._idle.append((kernel.compile_idle, signature))

    def started(self) -> None:
        """The engine answers now, and may be disturbed."""
        idle, self._idle = self._idle, []
        if idle:
            self._put([partial(self._compile_idle, idle)])

    def _compile_idle(self, idle: list[tuple[Callable[..., Any], Signature]]) -> None:
        works = (work for programs_of, signature in idle for work in programs_of(signature, self._device))
        for work in works:
            if not threading.main_thread().is_alive():
                return
            work()

    def _expand(self, programs_of: Callable[..., Any], signature: Signature) -> None:
        self._put(list(programs_of(signature, self._folder, self._device)))

    def _put(self, works: list[Callable[[], object]]) -> None:
        with self._lock:
            self._works.extend(works)
            for _ in range(min(self._num_threads - len(self._threads), len(works))):
                thread = threading.Thread(target=self._work, name="compiler", daemon=False)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                _LOG.debug("a kernel was not compiled ahead", exc_info=True)

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            # The interpreter waits for threads before it ends; these begin nothing more by then.
            if self._works and threading.main_thread().is_alive():
                return self._works.popleft()
            self._threads.remove(threading.current_thread())
            return None


def _key_of(signature: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(signature.items()))
