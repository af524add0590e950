"""A thousand requests of many kinds through an engine's loop, and what became of each.

Greedy, so that an answer does not depend on who else was there. Prompts share prefixes, some requests have two choices,
a priority, or a client that leaves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.loop import EngineLoop
from lockstep.engine.messages import Abort, FlushCache, Rejected, Shutdown, Submit

MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 600, 200
SHORT_PROMPT_TOKENS, BURST = 20, 50
"""Every other burst of requests has short prompts: many fit at first, and then their answers do not."""
ARRIVALS_PER_STEP = 4
STEPS_BETWEEN_CHECKS = 100
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Visitor:
    """A request, and after how many tokens its client leaves (None: it stays)."""

    request: Request
    leaves_after: int | None = None


@dataclass
class Record:
    """What a run did. `answers` holds the tokens of each choice by request id and index; `endings` why it ended.

    `fill` is the share of the pool's pages that live sequences held, step by step, while somebody waited.
    """

    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    endings: dict[tuple[str, int], str] = field(default_factory=dict)
    fill: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def mean_fill(self) -> float:
        return fmean(self.fill)


def draw_visitors(num_requests: int, vocab_size: int, seed: int) -> list[Visitor]:
    """Prompts of 1 to 600 tokens and 1 to 200 wanted: a third begins with one of a few prefixes, an eighth has two
    choices, a tenth leaves early, a fifth has another priority than the usual."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    prefixes = [_tokens(rng, vocab_size, rng.randint(20, 400)) for _ in range(6)]
    visitors = []
    for number in range(num_requests):
        is_short = number // BURST % 2
        length = rng.randint(1, SHORT_PROMPT_TOKENS if is_short else MOST_PROMPT_TOKENS)
        head = rng.choice(prefixes)[: length - 1] if rng.random() < 1 / 3 else []
        num_wanted = rng.randint(1, MOST_OUTPUT_TOKENS)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=tuple(head + _tokens(rng, vocab_size, length - len(head))),
            params=SamplingParams(
                temperature=0.0, max_tokens=num_wanted, ignore_eos=True, n=2 if rng.random() < 1 / 8 else 1
            ),
            priority=rng.choice((-1, 1)) if rng.random() < 1 / 5 else 0,
        )
        visitors.append(Visitor(request, rng.randrange(num_wanted) if rng.random() < 1 / 10 else None))
    return visitors


def run(loop: EngineLoop, visitors: Sequence[Visitor]) -> Record:
    """Everyone arrives, a few a step, and is followed to the end. The scheduler is checked on the way and at the end.

    Raises AssertionError for a request that is refused.
    """
    record, arriving, leaving = Record(), list(reversed(visitors)), dict[str, int]()
    scheduler = loop.core.scheduler
    while arriving or loop.has_work:
        commands: list[Submit | Abort | FlushCache | Shutdown] = []
        for visitor in [arriving.pop() for _ in range(min(ARRIVALS_PER_STEP, len(arriving)))]:
            commands.append(Submit(visitor.request))
            if visitor.leaves_after is not None:
                leaving[visitor.request.request_id] = visitor.leaves_after
        commands += [Abort(name) for name in _take_leavers(leaving, record)]
        events, answers = loop.run_once(commands)
        assert not [answer for answer in answers if isinstance(answer, Rejected)]
        for event in events:
            choice = (event.request_id, event.index)
            record.answers.setdefault(choice, []).extend(event.token_ids)
            if event.finish_reason is not None:
                assert event.error is None, event.error
                assert choice not in record.endings
                record.endings[choice] = event.finish_reason
        stats = scheduler.stats()
        if stats.num_waiting:
            record.fill.append(stats.num_pages_in_use / stats.num_pages_total)
        record.num_steps += 1
        if record.num_steps % STEPS_BETWEEN_CHECKS == 0:
            scheduler.check()
    scheduler.check()
    stats = scheduler.stats()
    record.num_preemptions, record.num_cached_tokens = stats.num_preemptions, stats.num_cached_tokens
    assert stats.num_pages_in_use == 0
    return record


def _take_leavers(leaving: dict[str, int], record: Record) -> list[str]:
    """Requests whose clients have what they stayed for, no longer among those to leave."""
    gone = [name for name, count in leaving.items() if len(record.answers.get((name, 0), ())) >= count]
    for name in gone:
        del leaving[name]
    return gone


def _tokens(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def assert_same_answers(loop: EngineLoop, visitors: Sequence[Visitor], found: Record, expected: Record) -> None:
    """Every choice ended, and its tokens are those of the other run as far as both go.

    Which of two equally likely tokens comes first may depend on the batch: `loop` is asked whether it was such a pair.
    """
    by_id = {visitor.request.request_id: visitor for visitor in visitors}
    wanted = {(name, index) for name, each in by_id.items() for index in range(each.request.params.n)}
    assert set(found.endings) == set(expected.endings) == wanted
    for choice, tokens in found.answers.items():
        visitor = by_id[choice[0]]
        if visitor.leaves_after is None:
            assert found.endings[choice] == "length"
            assert len(tokens) == visitor.request.params.max_tokens
        others = expected.answers.get(choice, [])
        same = next(
            (at for at, pair in enumerate(zip(tokens, others, strict=False)) if len(set(pair)) > 1), None
        )
        if same is not None:
            prompt = (*visitor.request.prompt_token_ids, *tokens[:same])
            gap = _gap_of_best(loop, prompt)
            assert gap < NEAR_TIE, f"{choice} differs from token {same} on, and the gap there is {gap:.2g}"


def _gap_of_best(loop: EngineLoop, prompt: tuple[int, ...]) -> float:
    """How much more likely, in log-probability, the best next token is than the second best."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=2)
    events, _ = loop.run_once([Submit(Request(request_id="tie", prompt_token_ids=prompt, params=params))])
    while loop.has_work:
        events += loop.run_once([])[0]
    (best, second) = next(event.logprobs[0].top for event in events if event.logprobs)
    return best[1] - second[1]
