"""Deadlines, with a clock that moves only when told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_llm import make_tiny

from lockstep.core.clock import ManualClock
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceEvent
from lockstep.engine.assembly import Engine
from lockstep.engine.loop import EngineLoop
from lockstep.engine.messages import Abort, Submit

pytestmark = pytest.mark.suite("cpu")

PARAMS = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = tmp_path_factory.mktemp("llama")
    make_tiny(path)
    made = Engine(
        {
            "model": str(path),
            "dtype": "float32",
            "threads": 1,
            "max_total_tokens": 512,
            "max_running_requests": 2,
        }
    )
    yield made
    made.close()


class Run:
    """A loop on its own clock, and what it said of each request."""

    def __init__(self, engine: Engine) -> None:
        self.clock = ManualClock(100.0)
        self.loop = EngineLoop(engine.rank.core, clock=self.clock)
        self.events: dict[str, list[SequenceEvent]] = {}

    def submit(self, request_id: str, deadline_s: float | None) -> None:
        request = Request(
            request_id=request_id, prompt_token_ids=(1, 2, 3), params=PARAMS, deadline_s=deadline_s
        )
        self.step(Submit(request))

    def step(self, *commands: Submit | Abort) -> None:
        events, answers = self.loop.run_once(commands)
        assert not answers
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def num_tokens(self, request_id: str) -> int:
        return sum(len(event.token_ids) for event in self.events.get(request_id, []))

    def ending(self, request_id: str) -> str | None:
        return self.events[request_id][-1].finish_reason if request_id in self.events else None


def test_a_deadline_ends_a_request_with_what_it_has(engine: Engine) -> None:
    run = Run(engine)
    run.submit("late", deadline_s=5.0)
    run.submit("free", deadline_s=None)
    for _ in range(4):
        run.clock.advance(1.0)
        run.step()
    assert run.ending("late") is None and run.num_tokens("late") == 6
    assert run.loop.seconds_to_deadline() == pytest.approx(1.0)
    run.clock.advance(1.0)
    run.step()
    assert run.ending("late") == "deadline" and run.num_tokens("late") == 6
    assert run.loop.seconds_to_deadline() is None
    while run.loop.has_work:
        run.step()
    assert run.ending("free") == "length" and run.num_tokens("free") == 50
    assert run.loop.stats().num_pages_in_use == 0


def test_a_deadline_reaches_requests_that_still_wait(engine: Engine) -> None:
    run = Run(engine)
    for name in ("first", "second"):
        run.submit(name, deadline_s=None)
    run.submit("waiting", deadline_s=0.5)
    assert run.loop.stats().num_waiting == 1
    run.clock.advance(0.5)
    run.step()
    assert run.ending("waiting") == "deadline" and run.num_tokens("waiting") == 0
    assert run.loop.stats().num_waiting == 0
    run.step(Abort("first"), Abort("second"))
    assert not run.loop.has_work


def test_a_finished_requests_deadline_does_not_reach_its_namesake(engine: Engine) -> None:
    run = Run(engine)
    run.submit("name", deadline_s=3.0)
    run.step(Abort("name"))
    run.submit("name", deadline_s=10.0)
    run.clock.advance(4.0)
    run.step()
    assert run.ending("name") is None
    run.clock.advance(6.0)
    run.step()
    assert run.ending("name") == "deadline"
    assert run.loop.stats().uptime_s == pytest.approx(10.0)
