"""Random requests, aborts and flushes, with an independent account of what each request must get."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from random import Random

from simulated_executor import SimulatedExecutor

from lockstep.core.errors import QueueFull
from lockstep.core.request import Pooling, Request
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.core.step import SequenceEvent, SequenceStart, StepPlan, StepResult
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.scheduler import Scheduler

EOS = 7
POOLINGS: list[Pooling] = ["mean", "last"]


def random_limits(rng: Random, *, overlap: bool = False) -> SchedulerLimits:
    """Tiny pools, so that eviction and preemption are the rule. With `overlap` results may come a step late."""
    page_size = rng.choice([1, 2, 4])
    return SchedulerLimits(
        max_running_requests=rng.randint(1, 8),
        chunk_tokens=rng.randint(1, 24),
        max_queued_requests=rng.randint(1, 8),
        context_length=rng.randint(8, 160),
        page_size=page_size,
        num_pages=rng.randint(24, 160) // page_size,
        policy=rng.choice(["fcfs", "priority"]),
        eos_token_ids=(EOS,),
        enable_prefix_cache=rng.random() < 0.8,
        num_host_pages=rng.choice([0, 3, 100]),
        max_plans_in_flight=2 if overlap else 1,
    )


@dataclass
class Choice:
    """What the client has received of one index of a request."""

    request: Request
    seq_id: int
    index: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids_described: list[int] = field(default_factory=list)
    final: SequenceEvent | None = None

    def may_end_at(self, position: int) -> bool:
        """Whether the generated token at `position` is one that ends the choice."""
        return self.token_ids[position] in self.stop_token_ids and position >= self.request.params.min_tokens


@dataclass
class RandomDriver:
    """One scheduler, one simulated executor, and the clients."""

    limits: SchedulerLimits
    rng: Random
    events_seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.vocab_size = self.rng.choice([8, 40, 200])
        self.executor = SimulatedExecutor(self.limits, self.rng, self.vocab_size)
        self.choices: dict[tuple[str, int], Choice] = {}
        self.plans: list[StepPlan] = []
        self.first_hits: dict[int, int] = {}
        self._flying: deque[tuple[StepPlan, StepResult]] = deque()
        self._num_sequences = 0
        self._num_requests = 0
        self._last_prompt: tuple[int, ...] = ()
        self._bases = [[self.rng.randrange(8) for _ in range(160)] for _ in range(3)]

    @property
    def _overlaps(self) -> bool:
        return self.limits.max_plans_in_flight > 1

    def run(self, num_steps: int, *, keep_plans: bool = False) -> None:
        """Random traffic for that many steps, then until nothing is left; raises on the first contradiction."""
        step = 0
        while step < num_steps or self.scheduler.has_work:
            if step < num_steps:
                self._traffic()
            plan = self.scheduler.plan()
            assert plan is not None or self._flying or not self.scheduler.has_work
            self.scheduler.check()
            step += 1
            if plan is not None:
                self._submit(plan, keep_plans)
            if self.rng.random() < 0.1:
                self._traffic()
                self.events_seen["traffic in flight"] += bool(self._flying)
            may_wait = plan is not None and not plan.must_land and self._overlaps
            while len(self._flying) > (may_wait and self.rng.random() < 0.8):
                self._land()
        self.events_seen["steps"] += step
        self._check_end()

    def _submit(self, plan: StepPlan, keep: bool) -> None:
        if keep:
            self.plans.append(plan)
        for start in plan.started:
            self._saw_start(start)
        self.events_seen["planned ahead"] += bool(self._flying)
        self._flying.append((plan, self.executor.run(plan)))

    def _land(self) -> None:
        plan, result = self._flying.popleft()
        ended = {choice.seq_id for choice in self.choices.values() if choice.final is not None}
        running = {sequence.seq_id for sequence in self.scheduler._roster.running}
        self.executor.land(plan, result, ended, running)
        for event in self.scheduler.update(result):
            self._saw_event(event)
        self.scheduler.check()

    def _traffic(self) -> None:
        roll = self.rng.random()
        if roll < 0.35:
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                self._add()
        elif roll < 0.42 and self._num_requests:
            self._abort(f"r{self.rng.randrange(self._num_requests + 1)}")
        elif roll < 0.43:
            before = self.scheduler.stats()
            assert self.scheduler.flush_cache() == before.num_pages_cached
            assert self.scheduler.stats().num_pages_in_use == before.num_pages_in_use

    def _prompt(self, longest: int) -> tuple[int, ...]:
        """Often the beginning of a base, often with a tail of its own; or the last one and a token more."""
        rng = self.rng
        if rng.random() < 0.2 and len(self._last_prompt) < longest:
            return (*self._last_prompt, rng.randrange(8))
        length = rng.randint(1, longest if rng.random() < 0.1 else min(longest, 20))
        base = rng.choice(self._bases)
        num_shared = rng.choice([0, length // 2, length])
        return tuple(base[:num_shared] + [rng.randrange(8) for _ in range(length - num_shared)])

    def _add(self) -> None:
        rng = self.rng
        pooling: Pooling | None = rng.choice(POOLINGS) if rng.random() < 0.1 else None
        min_tokens = rng.choice([0, 0, 3])
        max_tokens = rng.choice([None, None, 5, 50])
        params = SamplingParams(
            n=rng.randint(2, 4) if pooling is None and rng.random() < 0.2 else 1,
            seed=rng.choice([0, 5, 2**64 - 1]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=rng.choice([(), (3,), (3, 4)]),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            logprobs=rng.choice([None, 1]),
            prompt_logprobs=rng.choice([None, None, 0]) if pooling is None else None,
            grammar=Grammar("json_object") if self._overlaps and rng.random() < 0.02 else None,
        )
        longest = min(self.limits.context_length - 1, self.limits.num_pages * self.limits.page_size)
        prompt = self._last_prompt = self._prompt(longest)
        if max_tokens is not None:
            fitting = min(max_tokens, self._room(prompt))
            params = replace(params, max_tokens=fitting, min_tokens=min(min_tokens, fitting))
        request = Request(
            request_id=f"r{self._num_requests}",
            prompt_token_ids=prompt,
            params=params,
            priority=rng.randint(-1, 1),
            pooling=pooling,
        )
        try:
            self.scheduler.add(request)
        except QueueFull:
            self.events_seen["queue full"] += 1
            return
        self._num_requests += 1
        self._expect(request)

    def _room(self, prompt: tuple[int, ...]) -> int:
        """Tokens that may follow the prompt."""
        longest = min(self.limits.context_length, self.limits.num_pages * self.limits.page_size + 1)
        return longest - len(prompt)

    def _expect(self, request: Request) -> None:
        """Writes down what the client may get."""
        params = request.params
        room = self._room(request.prompt_token_ids)
        stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
        for index in range(params.n):
            self.choices[request.request_id, index] = Choice(
                request, self._num_sequences, index, min(params.max_tokens or room, room), stop_token_ids
            )
            self._num_sequences += 1

    def _abort(self, request_id: str) -> None:
        unfinished = [c for (rid, _), c in self.choices.items() if rid == request_id and c.final is None]
        events = self.scheduler.abort(request_id, "deadline" if self.rng.random() < 0.5 else "abort")
        assert [event.index for event in events] == [choice.index for choice in unfinished]
        for choice, event in zip(unfinished, events, strict=True):
            assert event.request_id == request_id and event.finish_reason in ("abort", "deadline")
            assert not event.token_ids
            choice.final = event
        self.events_seen["aborted"] += len(events)
        self.scheduler.check()

    def _saw_start(self, start: SequenceStart) -> None:
        choice = next(c for c in self.choices.values() if c.seq_id == start.seq_id)
        assert choice.final is None
        seed = choice.request.params.seed
        assert seed is not None and start.params.seed == (seed + choice.index) % 2**64
        assert start.token_ids == choice.request.prompt_token_ids + tuple(choice.token_ids)
        all_rows = choice.request.pooling == "mean" or (
            start.params.prompt_logprobs is not None
            and len(choice.prompt_token_ids_described) < start.num_prompt_tokens - 1
        )
        assert not (all_rows and start.num_cached_tokens)
        self.first_hits.setdefault(start.seq_id, start.num_cached_tokens)

    def _saw_event(self, event: SequenceEvent) -> None:
        choice = self.choices[event.request_id, event.index]
        params = choice.request.params
        assert choice.final is None, "news after the end"
        assert event.num_cached_tokens == self.first_hits[choice.seq_id]
        choice.token_ids.extend(event.token_ids)
        choice.prompt_token_ids_described.extend(found.token_id for found in event.prompt_logprobs)
        if params.logprobs is not None:
            assert tuple(found.token_id for found in event.logprobs) == event.token_ids
        else:
            assert event.logprobs == ()
        offered = self.executor.offered[choice.seq_id]
        assert choice.token_ids == offered[: len(choice.token_ids)]
        assert not any(choice.may_end_at(at) for at in range(len(choice.token_ids) - 1))
        assert len(choice.token_ids) <= choice.max_new_tokens
        self.events_seen[event.finish_reason or "news"] += 1
        if event.finish_reason is not None:
            choice.final = event
            self._check_final(choice, event, num_dropped=len(offered) - len(choice.token_ids))
        else:
            assert event.token_ids or event.prompt_logprobs, "an event without news"
            assert not choice.token_ids or not choice.may_end_at(len(choice.token_ids) - 1)
            assert len(choice.token_ids) < choice.max_new_tokens
            assert choice.seq_id not in self.executor.completed

    def _check_final(self, choice: Choice, event: SequenceEvent, num_dropped: int) -> None:
        request = choice.request
        completed = choice.seq_id in self.executor.completed
        ends_at_stop = bool(choice.token_ids) and choice.may_end_at(len(choice.token_ids) - 1)
        self.events_seen["dropped tokens"] += num_dropped
        if event.finish_reason == "error":
            assert event.error and not event.token_ids
            return
        prompt_described = choice.prompt_token_ids_described
        wants_prompt = request.params.prompt_logprobs is not None and choice.index == 0
        assert prompt_described == (list(request.prompt_token_ids[1:]) if wants_prompt else [])
        assert (event.embedding is not None) == (request.pooling is not None)
        if request.pooling is not None:
            assert event.finish_reason == "stop" and not choice.token_ids
        elif ends_at_stop:
            assert event.finish_reason == "stop" and event.stop_token_id == choice.token_ids[-1]
        else:
            assert event.stop_token_id is None
            is_complete = completed and num_dropped == 0
            assert event.finish_reason == ("stop" if is_complete else "length")
            assert is_complete or len(choice.token_ids) == choice.max_new_tokens

    def _check_end(self) -> None:
        """Everything has ended, nothing is leaked, and the totals add up."""
        assert all(choice.final is not None for choice in self.choices.values())
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)
        by_request: dict[str, list[str]] = {}
        for (request_id, _), choice in self.choices.items():
            assert choice.final is not None
            by_request.setdefault(request_id, []).append(choice.final.finish_reason or "")
        assert stats.num_finished + stats.num_aborted == len(by_request)
        assert stats.num_output_tokens == sum(len(choice.token_ids) for choice in self.choices.values())
        firsts = [choice for choice in self.choices.values() if choice.seq_id in self.first_hits]
        assert stats.num_prompt_tokens == sum(
            len(choice.request.prompt_token_ids) for choice in firsts if choice.index == 0
        )
        assert stats.num_cached_tokens == sum(
            self.first_hits[choice.seq_id] for choice in firsts if choice.index == 0
        )
        assert stats.num_discarded_rows == self.executor.num_discarded_rows
        self.events_seen["discarded rows"] += stats.num_discarded_rows
        if not self.limits.enable_prefix_cache:
            assert stats.num_pages_cached == 0 and self.executor.num_hit_tokens == 0
        self.events_seen["preemptions"] += stats.num_preemptions
        self.events_seen["recomputed"] += self.executor.num_recomputed_sequences
        self.events_seen["hit tokens"] += self.executor.num_hit_tokens
        self.events_seen["read in their step"] += self.executor.num_pages_read_in_their_step
        self.events_seen["single steps"] += self.executor.num_single_steps
        self.events_seen["started beside others"] += self.executor.num_started_beside_others
        self.events_seen["read in flight"] += self.executor.num_pages_read_in_flight
        assert stats.num_host_cached_tokens == self.executor.num_host_hit_tokens
        self.events_seen["host hit tokens"] += stats.num_host_cached_tokens
        self.scheduler.flush_cache()
        self.scheduler.check()
        assert self.scheduler.stats().num_pages_cached == 0
        assert self.scheduler.flush_cache() == 0
