"""What the scheduler does in each situation, one small case at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_cases import EOS, PLAIN, ahead, answer, finish_all, limits, request, rows, step

from lockstep.core.errors import ConfigError, IntegrityError, InvalidRequest, QueueFull
from lockstep.core.output import EngineStats
from lockstep.core.request import Request
from lockstep.core.sampling import Grammar
from lockstep.core.step import SequenceEvent, SequenceResult, StepResult, TokenLogprob
from lockstep.scheduler.scheduler import Scheduler
from lockstep.scheduler.sequence import Sequence

pytestmark = pytest.mark.suite("cpu")

# -- chunks, decode, order


def test_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    scheduler = Scheduler(limits(chunk_tokens=6))
    scheduler.add(request("a", range(10), max_tokens=3))
    plan, events = step(scheduler)
    assert rows(plan) == [(0, 0, 6, False)] and events == []
    assert plan.started[0].token_ids == tuple(range(10)) and plan.started[0].page_ids == ()
    assert len(plan.slices[0].new_page_ids) == 3
    plan, events = step(scheduler)
    assert rows(plan) == [(0, 6, 4, True)] and plan.started == ()
    assert events == [SequenceEvent("a", 0, (PLAIN,))]
    assert rows(step(scheduler)[0]) == [(0, 10, 1, True)]
    _, events = step(scheduler)
    assert events == [SequenceEvent("a", 0, (PLAIN,), finish_reason="length")]
    assert not scheduler.has_work and scheduler.plan() is None


def test_each_running_sequence_gets_a_row_before_prompts_get_the_rest() -> None:
    scheduler = Scheduler(limits(chunk_tokens=8))
    scheduler.add(request("a", range(4)))
    step(scheduler)
    scheduler.add(request("b", range(20, 40)))
    scheduler.add(request("c", range(3)))
    assert rows(step(scheduler)[0]) == [(0, 4, 1, True), (1, 0, 7, False)]
    assert rows(step(scheduler)[0]) == [(0, 5, 1, True), (1, 7, 7, False)]
    assert rows(step(scheduler)[0]) == [(0, 6, 1, True), (1, 14, 6, True), (2, 0, 1, False)]
    assert rows(step(scheduler)[0]) == [(0, 7, 1, True), (1, 20, 1, True), (2, 1, 2, True)]


def test_long_prompt_of_high_priority_does_not_starve_decode() -> None:
    scheduler = Scheduler(limits(chunk_tokens=4, policy="priority"))
    scheduler.add(request("a", range(2), priority=5))
    step(scheduler)
    scheduler.add(request("urgent", range(20, 40), priority=0))
    step(scheduler)
    assert rows(step(scheduler)[0]) == [(1, 3, 3, False), (0, 3, 1, True)]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [0, 1, 2, 3]), ("priority", [2, 0, 3, 1])])
def test_order_of_admission(policy: str, order: list[int]) -> None:
    scheduler = Scheduler(limits(policy=policy, max_running_requests=1))
    for name, priority in (("a", 1), ("b", 2), ("c", 0), ("d", 1)):
        scheduler.add(request(name, range(5), priority=priority, max_tokens=1))
    assert [step(scheduler)[0].slices[0].seq_id for _ in range(4)] == order


def test_executor_hears_of_ended_sequences_once() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(5), max_tokens=1))
    scheduler.add(request("b", range(20, 25)))
    step(scheduler)
    assert step(scheduler)[0].ended == (0,)
    assert step(scheduler)[0].ended == ()


# -- preemption


def _crowd(**changes: Any) -> Scheduler:
    """Two sequences that together fill a pool of 12 pages exactly, after 16 generated tokens each."""
    scheduler = Scheduler(limits(num_pages=12, **changes))
    scheduler.add(request("a", range(8), priority=2))
    scheduler.add(request("b", range(20, 28), priority=1))
    for _ in range(17):
        plan, _ = step(scheduler)
        assert plan.ended == () and len(plan.slices) == 2
    return scheduler


def test_the_latest_is_preempted_and_recomputed_from_the_cache() -> None:
    scheduler = _crowd()
    scheduler.add(request("c", range(40, 42)))
    plan, _ = step(scheduler)
    assert plan.ended == (1,)
    assert rows(plan) == [(0, 24, 1, True)]
    assert scheduler.stats().num_preemptions == 1
    scheduler.abort("a")
    plan, _ = step(scheduler)
    assert [start.seq_id for start in plan.started] == [1, 2], "the preempted one waits in front"
    start = plan.started[0]
    assert start.token_ids == (*range(20, 28), *[PLAIN] * 17)
    assert start.num_prompt_tokens == 8
    # One page of its six was taken for "a"; the first five were still cached.
    assert start.num_cached_tokens == 20
    assert rows(plan)[0] == (1, 20, 5, True)


def test_priority_decides_who_is_preempted() -> None:
    plan, _ = step(_crowd(policy="priority"))
    assert plan.ended == (0,)
    assert rows(plan) == [(1, 24, 1, True)]


def test_admission_leaves_room_for_running_sequences_to_grow() -> None:
    scheduler = Scheduler(limits(num_pages=12))
    scheduler.add(request("a", range(8)))
    step(scheduler)
    scheduler.add(request("b", range(20, 45)))
    assert len(step(scheduler)[0].slices) == 1, "7 pages would leave 'a' 3 of the 4 that 16 tokens need"
    scheduler.abort("b")
    scheduler.add(request("c", range(20, 40)))
    assert len(step(scheduler)[0].slices) == 2


@pytest.mark.parametrize("preempt_after", [1, 2, 3])
def test_prompt_logprobs_are_not_repeated_after_a_preemption(preempt_after: int) -> None:
    scheduler = Scheduler(limits(chunk_tokens=6))
    prompt = tuple(range(20, 36))
    scheduler.add(request("a", prompt, prompt_logprobs=0, max_tokens=4))
    described: list[int] = []
    hits: list[int] = []
    num_steps = 0
    while (plan := scheduler.plan()) is not None:
        hits += [start.num_cached_tokens for start in plan.started]
        (piece,) = plan.slices
        logprobs = tuple(TokenLogprob(t, -1.0) for t in prompt[piece.start + 1 :][: piece.num_tokens])
        found = SequenceResult(0, (PLAIN,) if piece.samples else (), prompt_logprobs=logprobs)
        for event in scheduler.update(StepResult(plan.step_id, (found,))):
            described += [row.token_id for row in event.prompt_logprobs]
        num_steps += 1
        if num_steps == preempt_after:
            scheduler._roster.preempt_worst()
    assert described == list(prompt[1:])
    # Rows that the client lacks are computed again; once it has all of them, the cache serves.
    assert hits == ([0, 16] if preempt_after == 3 else [0, 0])


# -- finishing


def _answered(scheduler: Scheduler, *tokens: int, complete: bool = False) -> SequenceEvent:
    (event,) = step(scheduler, {0: SequenceResult(0, tokens, complete=complete)})[1]
    return event


def _one(**fields: Any) -> Scheduler:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(5), **fields))
    return scheduler


def test_end_token_stops() -> None:
    event = _answered(_one(), EOS)
    assert (event.token_ids, event.finish_reason, event.stop_token_id) == ((EOS,), "stop", EOS)


def test_end_token_can_be_ignored_but_a_stop_id_cannot() -> None:
    scheduler = _one(ignore_eos=True, stop_token_ids=(7,))
    assert _answered(scheduler, EOS).finish_reason is None
    event = _answered(scheduler, 7)
    assert (event.finish_reason, event.stop_token_id) == ("stop", 7)


def test_min_tokens_must_precede_a_stop() -> None:
    scheduler = _one(min_tokens=2)
    assert _answered(scheduler, EOS).finish_reason is None
    assert _answered(scheduler, EOS).finish_reason is None
    assert _answered(scheduler, EOS).finish_reason == "stop"


def test_tokens_after_a_stop_are_dropped_with_their_logprobs() -> None:
    scheduler = _one(logprobs=0)
    logprobs = tuple(TokenLogprob(token_id, -0.5) for token_id in (1, EOS, 2, 3))
    _, (event,) = step(scheduler, {0: SequenceResult(0, (1, EOS, 2, 3), logprobs)})
    assert event.token_ids == (1, EOS) and event.logprobs == logprobs[:2]
    assert scheduler.stats().num_output_tokens == 2


def test_several_tokens_are_owed_together() -> None:
    scheduler = _one()
    assert _answered(scheduler, 1, 2, 3).token_ids == (1, 2, 3)
    assert rows(step(scheduler)[0]) == [(0, 5, 3, True)]


def test_max_tokens_cuts_several_tokens() -> None:
    event = _answered(_one(max_tokens=2), 1, 2, 3)
    assert (event.token_ids, event.finish_reason) == ((1, 2), "length")


def test_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert _answered(_one(max_tokens=1), EOS).finish_reason == "stop"


@pytest.mark.parametrize("tokens", [(), (1,)])
def test_complete_finishes_before_min_tokens(tokens: tuple[int, ...]) -> None:
    event = _answered(_one(min_tokens=5), *tokens, complete=True)
    assert (event.token_ids, event.finish_reason, event.stop_token_id) == (tokens, "stop", None)


@pytest.mark.parametrize(
    ("changes", "num_tokens"),
    [({"context_length": 9}, 4), ({"num_pages": 2}, 4), ({"num_pages": 3}, 8)],
    ids=["context", "pool of 8", "pool of 12"],
)
@pytest.mark.parametrize("asks", [False, True], ids=["what fits", "by number"])
def test_generation_ends_with_the_context_or_the_pool(
    changes: dict[str, int], num_tokens: int, asks: bool
) -> None:
    """The last token needs no KV, so a pool of 8 tokens ends a sequence of 9. As many may be asked for, not more."""
    scheduler = Scheduler(limits(**changes))
    with pytest.raises(InvalidRequest, match=f"max_tokens {num_tokens + 1} .*; ask for at most {num_tokens}$"):
        scheduler.add(request("a", range(5), max_tokens=num_tokens + 1))
    scheduler.add(request("a", range(5), max_tokens=num_tokens if asks else None))
    events = finish_all(scheduler)
    assert len(events) == num_tokens and events[-1].finish_reason == "length"
    assert scheduler.stats().num_preemptions == 0


def test_embedding_needs_no_sample() -> None:
    scheduler = Scheduler(limits(chunk_tokens=4))
    scheduler.add(request("a", range(6), pooling="last"))
    plan, events = step(scheduler)
    assert rows(plan) == [(0, 0, 4, False)] and events == []
    assert plan.started[0].pooling == "last"
    plan, events = step(scheduler, {0: SequenceResult(0, embedding=(0.5, 0.25))})
    assert rows(plan) == [(0, 4, 2, False)]
    assert events == [SequenceEvent("a", 0, embedding=(0.5, 0.25), finish_reason="stop")]
    assert not scheduler.has_work


def test_embedding_of_a_prompt_that_fills_the_context() -> None:
    """No token follows, so no room is needed for one, however many steps the prompt takes."""
    for num_pages in (8, 64):
        scheduler = Scheduler(limits(chunk_tokens=12, context_length=32, num_pages=num_pages))
        scheduler.add(request("a", range(32), pooling="last"))
        assert [rows(step(scheduler)[0]) for _ in range(2)] == [[(0, 0, 12, False)], [(0, 12, 12, False)]]
        _, events = step(scheduler, {0: SequenceResult(0, embedding=(1.0,))})
        assert [event.finish_reason for event in events] == ["stop"] and not scheduler.has_work


def test_what_comes_with_one_token_is_not_lost() -> None:
    """Of a sequence in the middle of its answer, anything beside the token counts as it does at any other time."""
    logprob, embedding = TokenLogprob(PLAIN, -1.0), (1.0,)
    one, more = SequenceResult(0, (PLAIN,), (logprob,)), SequenceResult(0, (PLAIN, PLAIN), (logprob, logprob))
    cases: list[tuple[SequenceResult, SequenceEvent]] = [
        (one, SequenceEvent("a", 0, (PLAIN,), (logprob,))),
        (more, SequenceEvent("a", 0, (PLAIN, PLAIN), (logprob, logprob))),
        (
            SequenceResult(0, (PLAIN,), (logprob,), complete=True),
            SequenceEvent("a", 0, (PLAIN,), (logprob,), finish_reason="stop"),
        ),
        (
            SequenceResult(0, (PLAIN,), error="bad"),
            SequenceEvent("a", 0, finish_reason="error", error="bad"),
        ),
        (
            SequenceResult(0, (PLAIN,), embedding=embedding),
            SequenceEvent("a", 0, embedding=embedding, finish_reason="stop"),
        ),
        (
            SequenceResult(0, (PLAIN,), prompt_logprobs=(logprob,)),
            SequenceEvent("a", 0, (PLAIN,), prompt_logprobs=(logprob,)),
        ),
        (SequenceResult(0, (EOS,)), SequenceEvent("a", 0, (EOS,), finish_reason="stop", stop_token_id=EOS)),
    ]
    for found, expected in cases:
        scheduler = Scheduler(limits())
        scheduler.add(request("a", range(5), logprobs=0))
        for _ in range(3):
            step(scheduler)
        plan, events = step(scheduler, {0: found})
        assert rows(plan) == [(0, 7, 1, True)]
        assert events == [expected]


# -- results that come a step late


def test_a_sequence_is_planned_again_before_its_token_is_known() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(10), max_tokens=3))
    first, second = ahead(scheduler), ahead(scheduler)
    assert rows(first) == [(0, 0, 10, True)] and rows(second) == [(0, 10, 1, True)]
    with pytest.raises(IntegrityError, match="step 1 is in flight"):
        scheduler.plan()
    assert scheduler.update(answer(first)) == [SequenceEvent("a", 0, (PLAIN,))]
    third = ahead(scheduler)
    assert rows(third) == [(0, 11, 1, True)]
    assert len(scheduler.update(answer(second))) == 1
    assert scheduler.plan() is None and scheduler.has_work, "three tokens were asked for, three are coming"
    assert scheduler.update(answer(third))[0].finish_reason == "length"
    assert not scheduler.has_work and scheduler.stats().num_discarded_rows == 0


def test_the_row_after_an_end_is_discarded() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(11)))
    scheduler.add(request("b", range(20, 25)))
    first, second = ahead(scheduler), ahead(scheduler)
    events = scheduler.update(answer(first, {0: SequenceResult(0, (EOS,))}))
    assert [event.finish_reason for event in events] == ["stop", None]
    stats = scheduler.stats()
    assert (stats.num_pages_in_use, stats.num_pages_cached) == (2, 2), "its pages are free or cached at once"
    third = ahead(scheduler)
    assert third.ended == (0,) and rows(third) == [(1, 6, 1, True)]
    assert [event.request_id for event in scheduler.update(answer(second))] == ["b"]
    assert scheduler.stats().num_discarded_rows == 1 and scheduler.stats().num_output_tokens == 3


def test_what_may_follow_a_grammars_token_is_decided_on_the_host() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2, chunk_tokens=4))
    scheduler.add(request("a", range(6), grammar=Grammar("json_object")))
    first, second = ahead(scheduler), ahead(scheduler)
    assert (first.must_land, second.must_land) == (False, True), "the first chunk of a prompt samples nothing"
    scheduler.update(answer(first))
    with pytest.raises(IntegrityError, match="step 1 is in flight"):
        scheduler.plan()
    scheduler.update(answer(second))
    assert rows(ahead(scheduler)) == [(0, 6, 1, True)]


def test_one_that_is_preempted_gets_the_token_in_flight() -> None:
    """It waits for it, and starts again with it."""
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(6)))
    first = ahead(scheduler)
    scheduler._roster.preempt_worst()
    scheduler.check()
    assert scheduler.plan() is None, "a token of it is on its way"
    assert scheduler.update(answer(first)) == [SequenceEvent("a", 0, (PLAIN,))]
    again = ahead(scheduler)
    assert again.started[0].token_ids == (*range(6), PLAIN) and again.ended == (0,)
    # The step in flight computes the prompt's only full page, whoever owns it.
    assert rows(again) == [(0, 4, 3, True)]


def test_one_that_is_preempted_may_end_with_the_token_in_flight() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(6)))
    first = ahead(scheduler)
    scheduler._roster.preempt_worst()
    (event,) = scheduler.update(answer(first, {0: SequenceResult(0, (EOS,))}))
    assert event.finish_reason == "stop" and not scheduler.has_work
    assert scheduler.stats().num_pages_in_use == 0


def test_an_embedding_is_asked_for_once() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(6), pooling="last"))
    first = ahead(scheduler)
    assert scheduler.plan() is None
    (event,) = scheduler.update(answer(first, {0: SequenceResult(0, embedding=(1.0,))}))
    assert event.finish_reason == "stop" and not scheduler.has_work


def test_several_tokens_at_once_fit_no_plan_that_counts_on_one() -> None:
    scheduler = Scheduler(limits(max_plans_in_flight=2))
    scheduler.add(request("a", range(6)))
    first = ahead(scheduler)
    ahead(scheduler)
    with pytest.raises(IntegrityError, match="2 tokens, but a later plan in flight counts on one"):
        scheduler.update(answer(first, {0: SequenceResult(0, (1, 2))}))


# -- aborts


def test_abort_frees_pages_at_once_and_ends_each_index() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(6), n=3))
    scheduler.add(request("b", range(20, 26)))
    step(scheduler)
    events = scheduler.abort("a", "deadline")
    assert [(event.index, event.finish_reason) for event in events] == [(i, "deadline") for i in range(3)]
    assert scheduler.stats().num_pages_in_use == 2
    assert scheduler.abort("a") == [] and scheduler.abort("never") == []
    assert step(scheduler)[0].ended == (0, 1, 2)
    assert scheduler.stats().num_aborted == 1


def test_result_of_a_sequence_aborted_in_flight_is_ignored() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(6)))
    scheduler.add(request("b", range(20, 26)))
    plan = scheduler.plan()
    assert plan is not None
    assert len(scheduler.abort("a")) == 1
    scheduler.add(request("c", range(40, 46)))
    events = scheduler.update(answer(plan))
    assert [event.request_id for event in events] == ["b"]
    plan, _ = step(scheduler)
    assert plan.ended == (0,) and [start.seq_id for start in plan.started] == [2]
    assert scheduler.stats().num_output_tokens == 3


def test_request_id_can_be_used_again_after_its_end() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(6)))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(request("a", range(6)))
    scheduler.abort("a")
    scheduler.add(request("a", range(6)))
    assert step(scheduler)[0].slices[0].seq_id == 1


# -- refusals


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("a", ()), "the prompt is empty"),
        (request("a", range(64)), "64 tokens, but the context length of 64 leaves room for 63"),
        (request("a", range(65), pooling="last"), "65 tokens, but the context length of 64 leaves room for 64"),
        (request("a", range(41)), "41 tokens, but the KV pool holds 40"),
        (request("a", range(5), pooling="last", n=2), "n must be 1, not 2"),
    ],
)
def test_impossible_requests_are_refused(bad: Request, words: str) -> None:
    scheduler = Scheduler(limits(num_pages=10))
    with pytest.raises(InvalidRequest, match=words) as refusal:
        scheduler.add(bad)
    assert refusal.value.param in ("prompt", "n")
    assert not scheduler.has_work
    scheduler.check()


def test_queue_is_bounded_by_requests_that_have_not_run() -> None:
    scheduler = Scheduler(limits(max_queued_requests=2, max_running_requests=1))
    scheduler.add(request("a", range(5), n=4))
    scheduler.add(request("b", range(5)))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        scheduler.add(request("c", range(5)))
    step(scheduler)
    scheduler.add(request("c", range(5)))
    with pytest.raises(QueueFull):
        scheduler.add(request("d", range(5)))
    scheduler.abort("b")
    scheduler.add(request("d", range(5)))
    finish_all(scheduler)


def test_plans_and_results_alternate() -> None:
    scheduler = Scheduler(limits())
    with pytest.raises(IntegrityError, match="no step is in flight"):
        scheduler.update(StepResult(0))
    scheduler.add(request("a", range(5)))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(IntegrityError, match="step 0 is in flight"):
        scheduler.plan()
    with pytest.raises(IntegrityError, match="but the result is of step 7"):
        scheduler.update(StepResult(7, (SequenceResult(0, (1,)),)))
    with pytest.raises(IntegrityError, match=r"sequences \[5\]"):
        scheduler.update(StepResult(0, (SequenceResult(5, (1,)),)))
    assert len(scheduler.update(answer(plan))) == 1


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, SequenceResult(0)),
        ({}, SequenceResult(0, embedding=(1.0,))),
        ({"pooling": "last"}, SequenceResult(0)),
        ({"pooling": "last"}, SequenceResult(0, (1,))),
    ],
)
def test_result_that_answers_something_else_is_an_error(fields: dict[str, Any], found: SequenceResult) -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", range(5), **fields))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(IntegrityError, match="sequence 0 does not answer its slice"):
        scheduler.update(StepResult(plan.step_id, (found,)))


def test_token_that_was_not_asked_for_is_an_error() -> None:
    """A sequence past its prompt owes more than the step has rows for, so nothing is sampled."""
    scheduler = Scheduler(limits(chunk_tokens=2))
    for name in "ab":
        scheduler.add(request(name, (1,)))
    step(scheduler, {0: SequenceResult(0, (PLAIN,) * 4)})
    plan = scheduler.plan()
    assert plan is not None and rows(plan)[0] == (0, 1, 1, False)
    with pytest.raises(IntegrityError, match="does not answer"):
        scheduler.update(answer(plan, {0: SequenceResult(0, (PLAIN,))}))


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_limits_name_the_bad_field(value: Any) -> None:
    with pytest.raises(ConfigError, match="chunk_tokens must be an integer of at least 1"):
        limits(chunk_tokens=value)


def test_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'priority'"):
        limits(policy="prioriti")


# -- figures and the self-check


def test_stats_use_the_names_of_the_engine() -> None:
    scheduler = Scheduler(limits(max_running_requests=1))
    scheduler.add(request("a", range(9), max_tokens=2))
    scheduler.add(request("b", range(9)))
    step(scheduler)
    assert scheduler.stats() == EngineStats(
        num_running=1,
        num_waiting=1,
        num_pages_total=64,
        num_pages_in_use=3,
        page_size=4,
        num_steps=1,
        num_prompt_tokens=9,
        num_output_tokens=1,
        last_step_tokens=9,
    )
    step(scheduler)
    assert scheduler.stats().num_finished == 1
    assert scheduler.stats().num_pages_cached == 2


def _compute_without_slots(sequence: Sequence) -> None:
    sequence.token_ids.extend([PLAIN] * 9)
    sequence.num_computed = 12


CORRUPTIONS: dict[str, Callable[[Scheduler], object]] = {
    "running out of order": lambda s: s._roster.running._sequences.reverse(),
    "in two places": lambda s: s._roster.waiting._sequences.append(s._roster.running[1]),
    "in no place": lambda s: s._roster.waiting.pop(0),
    "ended but still running": lambda s: s._roster.running[0].group.unfinished.clear(),
    "running without pages": lambda s: setattr(s._roster.running[0], "table", None),
    "waiting with pages": lambda s: setattr(s._roster.waiting[0], "table", s._roster.running[0].table),
    "nothing owed": lambda s: setattr(s._roster.running[0], "num_computed", 6),
    "computed without slots": lambda s: _compute_without_slots(s._roster.running[0]),
    "beyond its last token": lambda s: s._roster.running[0].token_ids.extend([1] * 60),
    "queued requests miscounted": lambda s: setattr(s._roster, "_num_queued_requests", 0),
    "page lost": lambda s: s._pages._allocator.take(1),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_notices(corruption: str) -> None:
    scheduler = Scheduler(limits(max_running_requests=2))
    for name in ("a", "b", "c"):
        scheduler.add(request(name, range(5)))
    step(scheduler)
    CORRUPTIONS[corruption](scheduler)
    with pytest.raises(IntegrityError):
        scheduler.check()
