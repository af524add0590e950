"""A step whose sequences read pages that other sequences of it fill: eager, as a graph, and in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taped_engine import PARAMS, Engine, layout_named
from tiny_models import PAGE_SIZE

from lockstep.core.step import SequenceStart, StepPlan, TokenLogprob, TokenSlice

pytestmark = pytest.mark.suite("cpu", seconds=5)

NUM_SHARED = 3 * PAGE_SIZE
PREFIX = tuple((7 * at + 3) % 90 for at in range(NUM_SHARED))
WRITER_PAGES, READER_PAGES = (5, 9, 2, 11), (30,)
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"with_graphs": True},
    "pieces": {"with_pieces": True},
    "both": {"with_graphs": True, "with_pieces": True},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other take longer than the work of a small case."""
    torch.set_num_threads(1)


def script(prefix: tuple[int, ...], tail: tuple[int, ...], num_early: int) -> list[StepPlan]:
    """The writer computes `num_early` tokens of the prefix, then the rest, in one step with the reader's tail."""
    writer = SequenceStart(0, PARAMS, prefix, NUM_SHARED, 0, ())
    shared = WRITER_PAGES[:3]
    reader = SequenceStart(1, PARAMS, (*prefix, *tail), NUM_SHARED + len(tail), NUM_SHARED, shared)
    read = TokenSlice(1, NUM_SHARED, len(tail), READER_PAGES, True)
    if not num_early:
        return [StepPlan(0, (writer, reader), (), (TokenSlice(0, 0, NUM_SHARED, shared, True), read))]
    early = TokenSlice(0, 0, num_early, shared, False)
    late = TokenSlice(0, num_early, NUM_SHARED - num_early, (), True)
    return [StepPlan(0, (writer,), (), (early,)), StepPlan(1, (reader,), (), (late, read))]


def alone(engine: Engine, tail: tuple[int, ...]) -> TokenLogprob:
    """What follows prefix and tail when one sequence computes them."""
    tokens = (*PREFIX, *tail)
    start = SequenceStart(7, PARAMS, tokens, len(tokens), 0, ())
    piece = TokenSlice(7, 0, len(tokens), (40, 41, 42, 43), True)
    return engine.runner.execute(StepPlan(9, (start,), (0, 1), (piece,))).sequences[0].logprobs[0]


@pytest.mark.parametrize("num_early", [0, 6, NUM_SHARED - 1])
@pytest.mark.parametrize("tail", [(4,), (4, 80, 33)], ids=["one token", "several"])
@pytest.mark.parametrize("mode", MODES)
def test_a_reader_answers_as_if_it_had_computed_all(mode: str, tail: tuple[int, ...], num_early: int) -> None:
    engine = Engine(layout_named("llama"), **MODES[mode])
    plans = script(PREFIX, tail, num_early)
    is_single = all(piece.num_tokens == 1 for piece in plans[-1].slices)
    assert is_single == (len(tail) == 1 and num_early == NUM_SHARED - 1), (
        "single tokens are a kind of their own"
    )
    for plan in plans:
        result = engine.runner.execute(plan)
    found = result.sequences[1].logprobs[0]
    expected = alone(Engine(layout_named("llama")), tail)
    assert found.token_id == expected.token_id
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    other = Engine(layout_named("llama"), **MODES[mode])
    for plan in script((PREFIX[0] + 1, *PREFIX[1:]), tail, num_early):
        result = other.runner.execute(plan)
    assert result.sequences[1].logprobs[0].logprob != pytest.approx(expected.logprob, abs=1e-3)
