"""Schedulers with small limits, requests for them, and steps answered with plain tokens."""

from __future__ import annotations

from typing import Any

from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceEvent, SequenceResult, StepPlan, StepResult
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.scheduler import Scheduler

EOS = 99
PLAIN = 50
"""A token that ends nothing."""


def limits(**changes: Any) -> SchedulerLimits:
    values: dict[str, Any] = {
        "max_running_requests": 4,
        "chunk_tokens": 64,
        "max_queued_requests": 8,
        "context_length": 64,
        "page_size": 4,
        "num_pages": 64,
        "eos_token_ids": (EOS,),
    }
    return SchedulerLimits(**(values | changes))


def request(name: str, prompt: range | tuple[int, ...], **fields: Any) -> Request:
    outer = {key: fields.pop(key) for key in ("priority", "pooling") if key in fields}
    params = SamplingParams(**({"seed": 1} | fields))
    return Request(request_id=name, prompt_token_ids=tuple(prompt), params=params, **outer)


Answers = dict[int, SequenceResult]


def answer(plan: StepPlan, special: Answers | None = None) -> StepResult:
    """One plain token for each slice that samples, unless `special` has another answer for the sequence."""
    plain = {p.seq_id: SequenceResult(p.seq_id, (PLAIN,) if p.samples else ()) for p in plan.slices}
    found = plain | {key: value for key, value in (special or {}).items() if key in plain}
    return StepResult(plan.step_id, tuple(found[p.seq_id] for p in plan.slices))


def step(scheduler: Scheduler, special: Answers | None = None) -> tuple[StepPlan, list[SequenceEvent]]:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.check()
    events = scheduler.update(answer(plan, special))
    scheduler.check()
    return plan, events


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(p.seq_id, p.start, p.num_tokens, p.samples) for p in plan.slices]


def finish_all(scheduler: Scheduler) -> list[SequenceEvent]:
    """Steps until nothing is left."""
    events: list[SequenceEvent] = []
    while scheduler.has_work:
        events += step(scheduler)[1]
    assert scheduler.plan() is None
    return events


def ahead(scheduler: Scheduler) -> StepPlan:
    """A plan whose result is still to be taken."""
    plan = scheduler.plan()
    assert plan is not None
    scheduler.check()
    return plan
