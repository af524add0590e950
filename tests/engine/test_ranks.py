"""The watch over worker processes: an end that nobody noticed breaks off what the first rank waits for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tiny_llm import make_tiny

from lockstep.core.errors import EngineDead
from lockstep.engine import ranks
from lockstep.engine.opening import open_for_running
from lockstep.engine.ranks import Ranks

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ranks, subprocess.Popen[bytes]]]:
    """The first of two ranks, and a second that does nothing until its lifeline is cut."""
    make_tiny(tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, spec: msgspec.Struct) -> subprocess.Popen[bytes]:
        code = "import sys; sys.stdin.read()"
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(ranks, "start_process", start)
    monkeypatch.setattr(ranks, "NOTICED_S", 0.1)
    config = open_for_running({"model": str(tmp_path), "tp": 2, "device": "cpu"}).config
    first = Ranks(config, tmp_path)
    yield first, started[0]
    first.close()


def test_an_end_that_nobody_noticed_breaks_off(two: tuple[Ranks, subprocess.Popen[bytes]]) -> None:
    first, worker = two
    broken_off = threading.Event()
    first.watch(broken_off.set)
    assert not broken_off.wait(1.0), "it lives"
    worker.kill()
    assert broken_off.wait(5.0)
    with pytest.raises(EngineDead, match="rank 1 ended with code -9"):
        first.check()


def test_who_closes_has_noticed(two: tuple[Ranks, subprocess.Popen[bytes]]) -> None:
    first, worker = two
    broken_off = threading.Event()
    first.watch(broken_off.set)
    first.close()
    assert worker.poll() is not None
    time.sleep(1.0)
    assert not broken_off.is_set()
