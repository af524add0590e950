"""Prefixes that sequences share: once they are computed, and before; between requests, and between choices of one."""

from __future__ import annotations

from typing import Any

import pytest
from small_cases import PLAIN, ahead, answer, finish_all, limits, request, rows, step

from lockstep.core.step import SequenceEvent, SequenceResult
from lockstep.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.suite("cpu")


def test_later_request_hits_the_prefix_of_an_earlier_one() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(10)))
    step(scheduler)
    scheduler.add(request("b", (*range(9), 77, 78), max_tokens=1))
    plan, events = step(scheduler)
    start = plan.started[0]
    assert (start.num_cached_tokens, len(start.page_ids)) == (8, 2)
    assert rows(plan)[1] == (1, 8, 3, True)
    assert events[1].num_cached_tokens == 8
    stats = scheduler.stats()
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (21, 8)


def test_a_prefix_is_shared_by_those_who_arrive_with_it() -> None:
    """One computes it, and those who come later in the same plan start from it."""
    scheduler = Scheduler(limits())
    for number in range(4):
        scheduler.add(request(f"{number}", (*range(16), 90 + number)))
    plan, _ = step(scheduler)
    assert rows(plan) == [(0, 0, 17, True), *((seq_id, 16, 1, True) for seq_id in (1, 2, 3))]
    assert len({start.page_ids for start in plan.started[1:]}) == 1
    assert plan.started[1].page_ids == plan.slices[0].new_page_ids[:4]
    assert scheduler.stats().num_cached_tokens == 48 and scheduler.stats().num_pages_in_use == 8


@pytest.mark.parametrize("max_plans_in_flight", [1, 2])
def test_what_one_token_fills_is_shared_from_the_next_plan_on(max_plans_in_flight: int) -> None:
    """In a step of single tokens nobody may read what another row stores."""
    scheduler = Scheduler(limits(chunk_tokens=7, max_plans_in_flight=max_plans_in_flight))
    scheduler.add(request("a", range(8)))
    assert rows(step(scheduler)[0]) == [(0, 0, 7, False)]
    scheduler.add(request("b", (*range(8), 91)))
    scheduler.add(request("c", (*range(4), 92)))
    beside, _ = step(scheduler)
    # All but the page that the first one fills just now, which the second computes for itself.
    assert rows(beside) == [(0, 7, 1, True), (1, 4, 5, True), (2, 4, 1, True)]
    scheduler.add(request("d", (*range(8), 93)))
    later, _ = step(scheduler)
    assert rows(later)[-1] == (3, 8, 1, True)
    assert later.started[0].page_ids[:1] == beside.started[0].page_ids[:1]
    finish_all(scheduler)


def test_who_ended_before_the_next_plan_shares_what_has_landed() -> None:
    scheduler = Scheduler(limits(chunk_tokens=7, max_plans_in_flight=2))
    scheduler.add(request("a", range(8)))
    step(scheduler)
    flying = ahead(scheduler)
    scheduler.abort("a")
    scheduler.add(request("b", (*range(8), 91)))
    assert rows(ahead(scheduler)) == [(1, 4, 5, True)]
    scheduler.update(answer(flying))
    scheduler.check()


def test_a_prefix_in_flight_is_shared() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(17)))
    first = ahead(scheduler)
    scheduler.add(request("b", (*range(16), 91, 92)))
    second = ahead(scheduler)
    assert rows(second) == [(0, 17, 1, True), (1, 16, 2, True)]
    assert second.started[0].page_ids == first.slices[0].new_page_ids[:4]


def test_only_full_pages_of_prompts_are_sharedahead() -> None:
    """What generated tokens are, nobody knows before their results; what fills no page, its owner still writes."""
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(6)))
    plans = [ahead(scheduler)]
    for _ in range(3):
        plans.append(ahead(scheduler))
        scheduler.update(answer(plans.pop(0)))
    # Two of the second page's four tokens are generated; both have landed, a third is planned.
    scheduler.add(request("b", (*range(6), PLAIN, PLAIN, 1)))
    assert ahead(scheduler).started[0].num_cached_tokens == 4


def test_who_shares_a_prompt_that_is_cut_waits_for_its_end() -> None:
    """A sequence whose last token is in flight leaves a row free: the prompt's next chunk takes it, no newcomer."""
    scheduler = Scheduler(limits(max_plans_in_flight=2, chunk_tokens=8))
    scheduler.add(request("a", (1,), max_tokens=3))
    scheduler.add(request("b", range(20, 52)))
    scheduler.add(request("c", (*range(20, 52), 90)))
    plans = [ahead(scheduler)]
    seen = [rows(plans[0])]
    for _ in range(4):
        plans.append(ahead(scheduler))
        seen.append(rows(plans[-1]))
        scheduler.update(answer(plans.pop(0)))
    assert seen == [
        [(0, 0, 1, True), (1, 0, 7, False)],
        [(0, 1, 1, True), (1, 7, 7, False)],
        [(0, 2, 1, True), (1, 14, 7, False)],
        [(1, 21, 8, False)],
        [(1, 29, 3, True), (2, 32, 1, True)],
    ]


@pytest.mark.parametrize("leaves", ["aborted", "preempted"])
def test_what_is_in_flight_outlives_its_writer(leaves: str) -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(17)))
    first = ahead(scheduler)
    if leaves == "aborted":
        scheduler.abort("a")
    else:
        scheduler._roster.preempt_worst()
    scheduler.check()
    scheduler.add(request("b", (*range(16), 91), priority=-1))
    if leaves == "preempted":
        assert scheduler.plan() is None, "the one before awaits a token"
        scheduler.update(answer(first))
    second = ahead(scheduler)
    assert second.ended == (0,)
    assert {start.num_cached_tokens for start in second.started} == {16}
    assert {start.page_ids for start in second.started} == {first.slices[0].new_page_ids[:4]}


def test_a_page_in_flight_goes_to_the_host_after_its_step() -> None:
    """The step that begins with the copy is the next one, whatever becomes of the writer."""
    scheduler = Scheduler(limits(max_plans_in_flight=2, num_pages=6, num_host_pages=6))
    scheduler.add(request("a", range(17)))
    first = ahead(scheduler)
    scheduler.abort("a")
    scheduler.add(request("b", range(30, 46)))
    second = ahead(scheduler)
    written = first.slices[0].new_page_ids
    assert first.page_copies == ()
    assert [(copy.page_id, copy.to_host) for copy in second.page_copies] == [
        (written[2], True),
        (written[3], True),
    ]
    scheduler.update(answer(first))
    scheduler.abort("b")
    scheduler.add(request("c", (*range(16), 91)))
    third = ahead(scheduler)
    assert third.started[0].num_cached_tokens == 16 and third.started[0].page_ids == written[:2]
    assert sum(not copy.to_host for copy in third.page_copies) == 2


def test_what_a_failed_sequence_computed_is_withdrawn() -> None:
    """But not what it started from, nor from those who have it already."""
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(9)))
    scheduler.add(request("b", (*range(8), *range(50, 58), 1)))
    scheduler.add(request("c", (*range(8), *range(50, 58), 2)))
    bad = {1: SequenceResult(1, error="numbers went bad")}
    plan, events = step(scheduler, bad)
    assert [start.num_cached_tokens for start in plan.started] == [0, 8, 16]
    assert [event.error for event in events] == [None, "numbers went bad", None]
    scheduler.add(request("d", (*range(8), *range(50, 58), 3)))
    plan, _ = step(scheduler)
    assert plan.started[0].num_cached_tokens == 8
    assert rows(plan) == [(0, 9, 1, True), (2, 17, 1, True), (3, 8, 9, True)]
    scheduler.add(request("e", (*range(8), *range(50, 58), 4)))
    again = step(scheduler)[0].started[0]
    assert again.num_cached_tokens == 16 and again.page_ids[2:] == plan.slices[2].new_page_ids[:2]
    for name in "acde":
        scheduler.abort(name)
    scheduler.check()
    stats = scheduler.stats()
    assert stats.num_pages_in_use == 0 and scheduler.flush_cache() == stats.num_pages_cached > 0
    scheduler.check()


def test_generated_tokens_are_cached_when_a_sequence_finishes() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(6), max_tokens=7))
    finish_all(scheduler)
    scheduler.add(request("b", (*range(6), *[PLAIN] * 7, 3)))
    # 6 prompt tokens and 6 of the 7 generated were computed: 3 full pages.
    assert step(scheduler)[0].started[0].num_cached_tokens == 12


@pytest.mark.parametrize(
    "fields", [{"prompt_logprobs": 0}, {"pooling": "mean"}], ids=["prompt_logprobs", "mean pooling"]
)
def test_request_that_needs_every_row_gets_no_hit(fields: dict[str, Any]) -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(12), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", range(12), **fields))
    plan = scheduler.plan()
    assert plan is not None and plan.started[0].num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_kept() -> None:
    scheduler = Scheduler(limits(enable_prefix_cache=False))
    for name in ("a", "b"):
        scheduler.add(request(name, range(12), max_tokens=2))
        plan, _ = step(scheduler)
        assert plan.started[0].num_cached_tokens == 0
        finish_all(scheduler)
    stats = scheduler.stats()
    assert (stats.num_pages_cached, stats.num_pages_in_use) == (0, 0)


def test_siblings_wait_for_the_prompt_and_share_its_pages() -> None:
    scheduler = Scheduler(limits(chunk_tokens=6))
    scheduler.add(request("a", range(9), n=3, seed=2**64 - 1, max_tokens=8, prompt_logprobs=1))
    scheduler.add(request("b", range(20, 22)))
    assert scheduler.num_waiting == 4
    assert rows(step(scheduler)[0]) == [(0, 0, 6, False)]
    plan, _ = step(scheduler)
    assert rows(plan) == [(0, 6, 3, True), (1, 8, 1, True), (2, 8, 1, True), (3, 0, 1, False)]
    siblings = plan.started[:2]
    assert [start.num_cached_tokens for start in siblings] == [8, 8]
    assert [start.params.seed for start in siblings] == [0, 1]
    assert [start.params.prompt_logprobs for start in siblings] == [None, None]


def test_siblings_run_when_the_first_one_fails() -> None:
    scheduler = Scheduler(limits(chunk_tokens=6))
    scheduler.add(request("a", range(9), n=2))
    _, events = step(scheduler, {0: SequenceResult(0, error="numbers went bad")})
    assert events == [SequenceEvent("a", 0, finish_reason="error", error="numbers went bad")]
    plan, _ = step(scheduler)
    assert plan.ended == (0,) and plan.started[0].seq_id == 1
    assert plan.started[0].num_cached_tokens == 0


def test_flush_frees_cached_pages_that_nobody_uses() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(8), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", range(20, 28)))
    step(scheduler)
    assert scheduler.flush_cache() == 2
    assert scheduler.flush_cache() == 0
    assert scheduler.stats().num_pages_in_use == 2
