"""The next step is planned before the last one's result is taken, and every request gets what it gets without that."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import END_ID, PAGE_SIZE, make_tiny, open_tiny

from lockstep.core.errors import EngineDead, IntegrityError
from lockstep.core.request import Request
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.core.step import Executor, Pending, SequenceEvent, StepPlan, StepResult
from lockstep.engine.assembly import Engine
from lockstep.engine.llm import LLM
from lockstep.engine.messages import Abort, FlushCache, StepInputs, Submit

pytestmark = pytest.mark.suite("cpu", seconds=60)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0)
GRAMMAR = Grammar("regex", "[a-f]{3,9}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_tiny(made)
    return made


def make_engine(path: Path, overlap: str, **options: Any) -> Engine:
    settings: dict[str, Any] = {"dtype": "float32", "threads": 1, "page_size": PAGE_SIZE}
    return Engine({"model": str(path), **settings, "max_total_tokens": 1024, "overlap": overlap, **options})


@dataclass
class Noted:
    """An executor that notes in which order steps are submitted and taken."""

    inner: Executor
    fails_at: int | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)

    def submit(self, plan: StepPlan) -> Pending:
        self.calls.append(("submit", plan.step_id))
        return _NotedStep(self, plan.step_id, self.inner.submit(plan))


@dataclass
class _NotedStep:
    owner: Noted
    step_id: int
    inner: Pending

    def result(self) -> StepResult:
        self.owner.calls.append(("result", self.step_id))
        if self.owner.fails_at == self.step_id:
            raise RuntimeError("the device fell over")
        return self.inner.result()


def noted(llm: LLM, fails_at: int | None = None) -> Noted:
    core = llm._engine.rank.core
    core.executor = Noted(core.executor, fails_at)
    return core.executor


# -- the order of things


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_step_is_submitted_before_the_last_one_is_taken(path: Path, overlap: str) -> None:
    with open_tiny(path, overlap=overlap) as llm:
        executor = noted(llm)
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    if overlap == "off":
        assert executor.calls == [(what, step) for step in range(4) for what in ("submit", "result")]
    else:
        assert executor.calls == [
            ("submit", 0),
            *((what, step + (what == "submit")) for step in range(3) for what in ("submit", "result")),
            ("result", 3),
        ], "and no fifth step, since four tokens are all that was asked for"


def test_a_grammar_waits_for_each_token(path: Path) -> None:
    """And free requests beside it share its steps; alone again, they run ahead again."""
    with open_tiny(path, overlap="on") as llm:
        executor = noted(llm)
        bound = SamplingParams(temperature=1.0, seed=1, max_tokens=12, grammar=GRAMMAR)
        answer = llm.generate([[1, 2, 3]], bound)[0]
        in_turn = [(what, step) for step in range(len(executor.calls) // 2) for what in ("submit", "result")]
        assert executor.calls == in_turn
        assert 3 <= len(answer.text) <= 9 and set(answer.text) <= set("abcdef")
        executor.calls.clear()
        llm.generate(
            [[1, 2, 3], [4, 5]], [bound, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)]
        )
        kinds = [what for what, _ in executor.calls]
        assert kinds[:6] == ["submit", "result"] * 3
        assert ("submit", "submit") in set(pairwise(kinds))


def test_a_row_that_was_computed_in_vain_is_counted(path: Path) -> None:
    with open_tiny(path, overlap="on") as llm:
        free = llm.generate([[9, 8, 7]], GREEDY)[0]
        assert llm.stats().num_discarded_rows == 0, "the end of max_tokens is known beforehand"
        stop = free.token_ids[4]
        stopped = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
        answer = llm.generate([[9, 8, 7]], stopped)[0]
        assert answer.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
        llm.generate([[1]], SamplingParams(max_tokens=1))
        stats = llm.stats()
        assert (stats.num_discarded_rows, stats.num_pages_in_use, stats.num_running) == (1, 0, 0)


# -- the same answers


def random_params(chooser: random.Random, number: int) -> SamplingParams:
    """Everything that decides a token or an end."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.2, "repetition_penalty": 1.3, "logit_bias": {65: 3.0}},
        {"temperature": 1.0, "max_tokens": 20, "min_tokens": 5, "stop_token_ids": (1, 2, 3)},
        {"temperature": 1.0, "stop_token_ids": tuple(range(0, END_ID, 7))},
        {"temperature": 1.0, "grammar": GRAMMAR},
    ]
    common: dict[str, Any] = {
        "seed": number,
        "n": chooser.choice([1, 1, 1, 2]),
        "max_tokens": chooser.choice([1, 8, 60, 60]),
        "ignore_eos": chooser.random() < 0.5,
        "logprobs": chooser.choice([None, 0]),
        "prompt_logprobs": chooser.choice([None, None, None, 0]),
    }
    return SamplingParams(**common | chooser.choice(kinds))


@dataclass
class Client:
    """One request, and what came of it."""

    request: Request
    aborted_after: int | None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, str] = field(default_factory=dict)
    num_prompt_logprobs: int = 0
    num_logprobs: int = 0

    def hear(self, event: SequenceEvent) -> None:
        assert event.index not in self.endings, "news after the end"
        self.tokens.setdefault(event.index, []).extend(event.token_ids)
        self.num_prompt_logprobs += len(event.prompt_logprobs)
        self.num_logprobs += len(event.logprobs)
        if event.finish_reason is not None:
            self.endings[event.index] = event.finish_reason

    @property
    def wants_abort(self) -> bool:
        num_tokens = sum(map(len, self.tokens.values()))
        return self.aborted_after is not None and num_tokens >= self.aborted_after


def random_clients(seed: int) -> list[Client]:
    chooser = random.Random(seed)
    base = [chooser.randrange(END_ID) for _ in range(60)]
    clients = []
    for number in range(40):
        shared = base[: chooser.choice([0, 0, 20, 45])]
        prompt = (*shared, *(chooser.randrange(END_ID) for _ in range(chooser.randint(1, 30))))
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=prompt,
            params=random_params(chooser, number),
            priority=chooser.randint(-1, 1),
        )
        clients.append(Client(request, chooser.choice([None, None, None, None, 0, 3])))
    return clients


def serve(engine: Engine, clients: Sequence[Client]) -> None:
    """Clients come two at a time; some leave early; the cache is flushed now and then."""
    by_id = {client.request.request_id: client for client in clients}
    arriving, leaving = list(clients), {id(client) for client in clients if client.aborted_after is not None}
    for turn in range(4000):
        commands: list[Submit | Abort | FlushCache] = [Submit(client.request) for client in arriving[:2]]
        del arriving[:2]
        for client in clients:
            if id(client) in leaving and client.wants_abort and client not in arriving:
                leaving.discard(id(client))
                commands.append(Abort(client.request.request_id))
        if turn % 17 == 0:
            commands.append(FlushCache(turn))
        events, _ = engine.loop.run_once(commands)
        for event in events:
            by_id[event.request_id].hear(event)
        engine.rank.core.scheduler.check()
        if not arriving and not engine.loop.has_work:
            return
    raise AssertionError("requests are left")


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_get_the_same_in_both_ways(path: Path, seed: int) -> None:
    """In a pool that holds a few of them, in chunks; those that leave early may have got one token more or less."""
    print(f"seed {seed}")
    options = {"max_total_tokens": 60 * PAGE_SIZE, "chunked_prefill_size": 24, "schedule_policy": "priority"}
    served: dict[str, list[Client]] = {}
    for overlap in ("off", "on"):
        engine = make_engine(path, overlap, **options)
        try:
            served[overlap] = random_clients(seed)
            serve(engine, served[overlap])
            stats = engine.loop.stats()
            assert stats.num_pages_in_use == 0 and stats.num_preemptions > 0
            assert (stats.num_discarded_rows > 0) == (overlap == "on")
        finally:
            engine.close()
    for one, other in zip(served["off"], served["on"], strict=True):
        assert len(one.endings) == len(other.endings) == one.request.params.n
        if one.aborted_after is not None:
            for index, tokens in one.tokens.items():
                shorter = min(len(tokens), len(other.tokens.get(index, [])))
                assert tokens[:shorter] == other.tokens.get(index, [])[:shorter]
            continue
        assert (one.tokens, one.endings) == (other.tokens, other.endings)
        assert one.num_prompt_logprobs == other.num_prompt_logprobs
        assert one.num_logprobs == other.num_logprobs


# -- ranks, and steps that fail


@pytest.fixture
def twins(path: Path) -> Iterator[tuple[Engine, Engine]]:
    made = make_engine(path, "on"), make_engine(path, "on")
    yield made
    for engine in made:
        engine.close()


def test_ranks_agree_on_what_was_taken(twins: tuple[Engine, Engine]) -> None:
    """Both take each result at the same place of the stream; the digest covers no token that is still in flight."""
    first, second = (engine.rank.core for engine in twins)
    request = Request(request_id="a", prompt_token_ids=(1, 2, 3), params=GREEDY)
    digests = []
    for step in range(6):
        inputs = StepInputs(step, [Submit(request)] if step == 0 else [], first.digest)
        digests.append(first.digest)
        first.follow(inputs)
        second.follow(inputs)
        assert first.digest == second.digest
    assert digests[0] == digests[1] == 0 and len(set(digests)) == 5
    with pytest.raises(IntegrityError, match="diverged before step 6"):
        second.follow(StepInputs(6, [], first.digest ^ 1))


def test_two_overlapped_ranks_answer_like_one(path: Path) -> None:
    prompts = [[1, 2, 3], list(range(40)), [7]]
    with open_tiny(path) as llm:
        expected = [answer.token_ids for answer in llm.generate(prompts, GREEDY)]
    with open_tiny(path, tp=2, overlap="on") as llm:
        for _ in range(2):
            assert [answer.token_ids for answer in llm.generate(prompts, GREEDY)] == expected


def test_a_step_that_fails_on_the_device_is_the_last(path: Path) -> None:
    """What went wrong shows when the result is taken, one step after the submission."""
    with open_tiny(path, overlap="on") as llm:
        executor = noted(llm, fails_at=2)
        with pytest.raises(RuntimeError, match="the device fell over"):
            llm.generate([[1, 2, 3]], GREEDY)
        assert executor.calls[-2:] == [("submit", 3), ("result", 2)]
        with pytest.raises(EngineDead, match="RuntimeError: the device fell over"):
            llm.generate([[1, 2, 3]], GREEDY)
