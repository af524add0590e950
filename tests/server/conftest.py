"""Servers for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_client import FakeClient
from running_server import InProcess, Live


@pytest.fixture
def in_process() -> Callable[..., InProcess]:
    """Makes an app over a fake client."""
    return lambda client=None, **options: InProcess(client or FakeClient(), **options)


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    """Starts servers that stop with the test."""
    started: list[Live] = []

    def start(client: FakeClient | None = None, **options: Any) -> Live:
        started.append(Live(client or FakeClient(), **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()
