"""The order of what a step computes."""

from __future__ import annotations

import pytest
from small_cases import PLAIN, limits, request, rows, step

from lockstep.scheduler.batch import MANY
from lockstep.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.suite("cpu")


def running(num_sequences: int) -> Scheduler:
    """Prompts of one to nineteen tokens, all different, computed in one step."""
    room = {"max_running_requests": num_sequences + 1, "max_queued_requests": num_sequences}
    scheduler = Scheduler(limits(chunk_tokens=2000, num_pages=4000, **room))
    for at in range(num_sequences):
        scheduler.add(request(f"{at}", (at,) * (1 + at * 7 % 19), max_tokens=6))
    plan, _ = step(scheduler)
    assert [row[0] for row in rows(plan)] == list(range(num_sequences)), "prompts in the order of arrival"
    return scheduler


def test_many_single_tokens_are_computed_longest_first() -> None:
    """Those of one length in the order of arrival; each result still reaches its own request."""
    scheduler = running(MANY)
    plan, events = step(scheduler)
    starts = [1 + at * 7 % 19 for at in range(MANY)]
    order = sorted(range(MANY), key=lambda at: -starts[at])
    assert rows(plan) == [(at, starts[at], 1, True) for at in order] and order != list(range(MANY))
    assert [event.request_id for event in events] == [f"{at}" for at in order]
    scheduler.abort(f"{order[0]}")
    scheduler.check()
    assert [row[0] for row in rows(step(scheduler)[0])] == sorted(order[1:]), "one less is not many"
    assert all(event.token_ids == (PLAIN,) for event in events)


def test_few_and_steps_with_prompts_keep_the_order_of_arrival() -> None:
    assert [row[0] for row in rows(step(running(MANY - 1))[0])] == list(range(MANY - 1))
    scheduler = running(MANY)
    scheduler.add(request("late", (7, 8, 9)))
    assert [row[0] for row in rows(step(scheduler)[0])] == list(range(MANY + 1))
