"""Steps of single tokens by one kernel, which makes heads ready, stores and attends: who runs it, and the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tape_graph import fresh_decode
from taped_engine import PARAMS, Engine, layout_named, plans
from tiny_models import PAGE_SIZE

from lockstep.attention import sharing
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice

pytestmark = pytest.mark.suite("cpu", seconds=5)

NUM_LAYERS = 2


def script() -> list[StepPlan]:
    """Prompts, single tokens, a prompt beside them, a prompt of one token beside them; somebody leaves."""
    made = plans({0: 5, 1: 2 * PAGE_SIZE, 2: 3}, shrinking=(1,), num_steps=8)
    for step, seq_id, length in ((3, 3, 6), (6, 4, 1)):
        start = SequenceStart(seq_id, PARAMS, tuple(range(10, 10 + length)), length, 0, ())
        pages = tuple(8 * seq_id + page for page in range(-(-length // PAGE_SIZE)))
        for at in range(step, len(made)):
            position = length + at - step - 1
            first = at == step
            new_page = (8 * seq_id + position // PAGE_SIZE,) if position % PAGE_SIZE == 0 else ()
            whole, next_token = (
                TokenSlice(seq_id, 0, length, pages, True),
                TokenSlice(seq_id, position, 1, new_page, True),
            )
            slices = (*made[at].slices, whole if first else next_token)
            made[at] = replace(made[at], started=(start,) if first else made[at].started, slices=slices)
    return made


def is_single(plan: StepPlan) -> bool:
    return plan.num_tokens == len(plan.slices)


def counted(calls: list[int], kernel: Callable[..., None] = fresh_decode) -> Callable[..., None]:
    """The kernel; notes how many rows each call had."""

    def function(*given: Any) -> None:
        calls.append(len(given[0]))
        kernel(*given)

    return function


def largest_difference(one: Engine, other: Engine, made: list[StepPlan]) -> float:
    """Between log-probabilities of the tokens that both choose; infinite where one chooses another."""
    gaps = [0.0]
    for plan in made:
        for mine, theirs in zip(
            one.runner.execute(plan).sequences, other.runner.execute(plan).sequences, strict=True
        ):
            assert mine.error is None
            if mine.token_ids != theirs.token_ids:
                return float("inf")
            gaps += [abs(a.logprob - b.logprob) for a, b in zip(mine.logprobs, theirs.logprobs, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 with experts"])
def test_eager_steps_of_single_tokens_take_one_kernel(name: str) -> None:
    calls: list[int] = []
    engine, made = Engine(layout_named(name), fresh=counted(calls)), script()
    assert largest_difference(engine, Engine(layout_named(name)), made) < 1e-5
    singles = [plan.num_tokens for plan in made if is_single(plan)]
    assert len(singles) == 7 and max(singles) == 4
    assert calls == [num_rows for num_rows in singles for _ in range(NUM_LAYERS)]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_recorded_steps_hold_the_same_kernel(name: str) -> None:
    calls: list[int] = []
    engine = Engine(layout_named(name), with_graphs=True, with_pieces=True, fresh=counted(calls))
    assert largest_difference(engine, Engine(layout_named(name)), script()) < 1e-5
    sizes = sorted(engine.graphs._recorded)
    assert {2, 4} <= set(sizes)
    # Run once before they are recorded; a replay calls nothing, nor do steps in pieces.
    assert sorted(calls) == [size for size in sizes for _ in range(2 * NUM_LAYERS)]
    assert engine.pieces._steps


@pytest.mark.parametrize("with_graphs", [False, True])
def test_a_wrong_kernel_is_noticed(with_graphs: bool) -> None:
    def stores_nothing(*given: Any) -> None:
        fresh_decode(*given[:6], *(pool.clone() for pool in given[6:8]), *given[8:])

    def turns_the_other_way(*given: Any) -> None:
        fresh_decode(*given[:5], -given[5], *given[6:])

    for wrong in (stores_nothing, turns_the_other_way):
        engine = Engine(layout_named("qwen3"), with_graphs=with_graphs, fresh=wrong)
        assert largest_difference(engine, Engine(layout_named("qwen3")), script()) > 1e-3


@pytest.mark.parametrize("with_graphs", [False, True])
def test_steps_that_share_keys_take_their_own_kernel(
    with_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "FEWEST_SAVED", PAGE_SIZE)
    calls: list[int] = []
    layout = layout_named("llama")
    engine = Engine(layout, with_graphs=with_graphs, shares=True, fresh=counted(calls))
    length = 2 * PAGE_SIZE + 2
    prompt = tuple(range(7, 7 + length))
    made = []
    first = SequenceStart(0, PARAMS, prompt, length, 0, ())
    second = SequenceStart(1, PARAMS, (*prompt[:-1], 90), length, 2 * PAGE_SIZE, (1, 2))
    slices = (TokenSlice(0, 0, length, (1, 2, 3), True), TokenSlice(1, 2 * PAGE_SIZE, 2, (4,), True))
    made.append(StepPlan(0, (first, second), (), slices))
    both = tuple(TokenSlice(seq_id, length, 1, (), True) for seq_id in (0, 1))
    made.append(StepPlan(1, (), (), both))
    made.append(StepPlan(2, (), (1,), (TokenSlice(0, length + 1, 1, (), True),)))
    assert largest_difference(engine, Engine(layout), made) < 1e-5
    assert set(calls) == {1}, "the second step shares"


def test_rows_of_nobody_store_nothing() -> None:
    engine = Engine(layout_named("qwen3"), with_graphs=True, fresh=fresh_decode)
    made = script()
    for plan in made[:2]:
        engine.runner.execute(plan)
    owned = {page for plan in made[:2] for piece in plan.slices for page in piece.new_page_ids}
    for layer in range(NUM_LAYERS):
        kv = engine.pool.layer(layer)
        for pool in (kv.k_NPSH, kv.v_NPSH):
            used = {page for page in range(pool.shape[1]) if bool(pool[:, page].any())}
            assert used == owned
