"""What a request gets does not depend on how its tokens were computed, nor on who else was there.

Each scenario is compared with the same prompt alone, uncached, in one chunk, in a pool with room for all, each step
waited for; and it is run both so and with the next step planned before the last one's result is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import (
    END_ID,
    PAGE_SIZE,
    TOLERANCE,
    assert_same,
    assert_same_choice,
    logprob_gap,
    make_tiny,
    open_tiny,
    random_prompts,
)

from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import TokenLogprob
from lockstep.engine.assembly import Engine
from lockstep.engine.llm import LLM, Completion
from lockstep.engine.messages import Submit

pytestmark = pytest.mark.suite("cpu")

# Shorter than a page, whole pages and one more or less, several chunks, across gemma3's window of 8.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 23, 31, 40, 66, 100)
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
SCORED = replace(GREEDY, prompt_logprobs=2)
# Chunks are of the prompt; the tokens after it read what they left, across the end of a page.
PROMPT_SCORED = replace(SCORED, max_tokens=PAGE_SIZE + 2)
# Fits about three of the longer requests with their answers.
SMALL_POOL = {"max_total_tokens": 50 * PAGE_SIZE}


@dataclass
class Tiny:
    """A tiny model on disk, the test prompts, and the answers to which others are compared."""

    path: Path
    prompts: list[list[int]]
    plain: LLM
    overlap: str

    def open(self, **options: Any) -> LLM:
        """An engine to be compared."""
        return open_tiny(self.path, overlap=self.overlap, **options)

    def alone(self, params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        """Each prompt by itself on an engine without a prefix cache."""
        each = params if isinstance(params, list) else [params] * len(self.prompts)
        return [self.plain.generate([prompt], one)[0] for prompt, one in zip(self.prompts, each, strict=True)]


@pytest.fixture(scope="module", autouse=True, params=["llama", "gemma3"])  # the outer parameter of all tests
def waiting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Each step waited for: what answers are compared with, whether theirs overlap or not."""
    path = tmp_path_factory.mktemp(request.param)
    make_tiny(path, request.param)
    with open_tiny(path, disable_radix_cache=True, chunked_prefill_size=512, overlap="off") as plain:
        yield Tiny(path, random_prompts(LENGTHS), plain, "off")


@pytest.fixture(scope="module", params=["off", "on"])
def tiny(waiting: Tiny, request: pytest.FixtureRequest) -> Tiny:
    return replace(waiting, overlap=request.param)


@pytest.fixture(scope="module")
def greedy(waiting: Tiny) -> list[Completion]:
    return waiting.alone(GREEDY)


@pytest.fixture(scope="module")
def scored(waiting: Tiny) -> list[Completion]:
    return waiting.alone(SCORED)


@pytest.fixture(scope="module")
def prompts_scored(waiting: Tiny) -> list[Completion]:
    return waiting.alone(PROMPT_SCORED)


@pytest.fixture(scope="module")
def sampled(waiting: Tiny) -> list[Completion]:
    return waiting.alone(various_params())


def various_params() -> list[SamplingParams]:
    """Seeded draws through every filter and penalty, and a greedy request here and there."""
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05, "temperature": 1.4},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"presence_penalty": 0.6, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.3, "logit_bias": {65: 4.0}},
        {"temperature": 0.0},
    ]
    return [
        SamplingParams(
            seed=1000 + at, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1, **kinds[at % len(kinds)]
        )
        for at in range(len(LENGTHS))
    ]


def test_the_tolerance_sees_one_changed_token(tiny: Tiny) -> None:
    params = replace(SCORED, max_tokens=1)
    (expected,) = tiny.plain.generate([tiny.prompts[5]], params)
    changed = [(tiny.prompts[5][0] + 1) % END_ID, *tiny.prompts[5][1:]]
    (found,) = tiny.plain.generate([changed], params)
    assert logprob_gap(found.prompt_logprobs, expected.prompt_logprobs) > 1000 * TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_chunk_size(tiny: Tiny, prompts_scored: list[Completion], chunk: int) -> None:
    with tiny.open(chunked_prefill_size=chunk, disable_radix_cache=True) as llm:
        assert_same([llm.generate([prompt], PROMPT_SCORED)[0] for prompt in tiny.prompts], prompts_scored)


@pytest.mark.parametrize("chunk", [len(LENGTHS), 64])
def test_company_of_fifteen(tiny: Tiny, greedy: list[Completion], chunk: int) -> None:
    with tiny.open(chunked_prefill_size=chunk) as llm:
        assert_same(llm.generate(tiny.prompts, GREEDY), greedy)
        assert llm.stats().num_steps < NUM_TOKENS + sum(LENGTHS), "they did not share steps"


def test_prefix_hit(tiny: Tiny, greedy: list[Completion]) -> None:
    with tiny.open() as llm:
        assert_same(llm.generate(tiny.prompts, GREEDY), greedy)
        again = llm.generate(tiny.prompts, GREEDY)
        assert_same(again, greedy)
        for answer, length in zip(again, LENGTHS, strict=True):
            assert answer.num_cached_tokens == (length - 1) // PAGE_SIZE * PAGE_SIZE


def test_prefix_hit_inside_an_answer_of_another(tiny: Tiny, greedy: list[Completion]) -> None:
    """A conversation goes on: the next prompt is the last one with its answer and more."""
    longer = [[*prompt, *answer.token_ids, 3, 1] for prompt, answer in zip(tiny.prompts, greedy, strict=True)]
    expected = [tiny.plain.generate([prompt], GREEDY)[0] for prompt in longer]
    with tiny.open() as llm:
        llm.generate(tiny.prompts, GREEDY)
        found = llm.generate(longer, GREEDY)
        assert_same(found, expected)
        assert (
            sum(answer.num_cached_tokens > length for answer, length in zip(found, LENGTHS, strict=True)) >= 12
        )


def test_after_a_flush(tiny: Tiny, greedy: list[Completion]) -> None:
    with tiny.open() as llm:
        llm.generate(tiny.prompts, GREEDY)
        assert llm.flush_cache() > 0
        assert llm.stats().num_pages_cached == 0
        assert_same(first := llm.generate(tiny.prompts[-1:], GREEDY), greedy[-1:])
        assert first[0].num_cached_tokens == 0


@pytest.mark.parametrize("cached", [True, False])
def test_preemption(tiny: Tiny, greedy: list[Completion], cached: bool) -> None:
    with tiny.open(chunked_prefill_size=32, disable_radix_cache=not cached, **SMALL_POOL) as llm:
        assert_same(llm.generate(tiny.prompts, GREEDY), greedy)
        stats = llm.stats()
        print(f"{stats.num_preemptions} preemptions")
        assert stats.num_preemptions > 0 and stats.num_pages_in_use == 0


def test_preemption_reports_each_prompt_row_once(tiny: Tiny, scored: list[Completion]) -> None:
    with tiny.open(chunked_prefill_size=16, **SMALL_POOL) as llm:
        found = llm.generate(tiny.prompts, SCORED)
        assert llm.stats().num_preemptions > 0
    assert [len(answer.prompt_logprobs) for answer in found] == [length - 1 for length in LENGTHS]
    assert_same(found, scored)


def test_seeded_draws_in_company(tiny: Tiny, sampled: list[Completion]) -> None:
    with tiny.open() as llm:
        assert_same(llm.generate(tiny.prompts, various_params()), sampled)
        assert_same(llm.generate(tiny.prompts[::-1], various_params()[::-1]), sampled[::-1])


def test_seeded_draws_through_preemption(tiny: Tiny, sampled: list[Completion]) -> None:
    with tiny.open(chunked_prefill_size=24, **SMALL_POOL) as llm:
        assert_same(llm.generate(tiny.prompts, various_params()), sampled)
        assert llm.stats().num_preemptions > 0


def test_penalties_remember_what_came_before_a_preemption(tiny: Tiny) -> None:
    params = replace(GREEDY, presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=1.2)
    with tiny.open(**SMALL_POOL) as llm:
        assert_same(llm.generate(tiny.prompts, params), tiny.alone(params))
        assert llm.stats().num_preemptions > 0


def test_siblings_are_requests_with_the_next_seeds(tiny: Tiny) -> None:
    params = SamplingParams(seed=77, n=3, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    prompts = tiny.prompts[-4:]
    with tiny.open() as llm:
        found = llm.generate(prompts, params)
    with tiny.open(**SMALL_POOL) as crowded:
        assert_same(crowded.generate(prompts, params), found)
        assert crowded.stats().num_preemptions > 0
    for prompt, answer in zip(prompts, found, strict=True):
        assert len({choice.token_ids for choice in answer.choices}) == 3
        for index, choice in enumerate(answer.choices):
            single = tiny.plain.generate([prompt], replace(params, n=1, seed=77 + index))[0]
            assert_same_choice(choice, single.choices[0])


def test_priorities_change_the_order_and_nothing_else(tiny: Tiny, greedy: list[Completion]) -> None:
    """The last to come is the most urgent; the pool is too small for all."""
    options = {"model": str(tiny.path), "dtype": "float32", "threads": 1, "page_size": PAGE_SIZE}
    options["overlap"] = tiny.overlap
    engine = Engine({**options, "schedule_policy": "priority", "chunked_prefill_size": 32, **SMALL_POOL})
    try:
        tokens: dict[str, list[int]] = {}
        logprobs: dict[str, list[TokenLogprob]] = {}
        finished: list[str] = []
        arriving = list(enumerate(tiny.prompts))
        while arriving or engine.loop.has_work:
            commands = []
            if arriving:
                at, prompt = arriving.pop(0)
                request = Request(
                    request_id=str(at), prompt_token_ids=tuple(prompt), params=GREEDY, priority=-at
                )
                commands = [Submit(request)]
            events, answers = engine.loop.run_once(commands)
            assert not answers
            for event in events:
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
                logprobs.setdefault(event.request_id, []).extend(event.logprobs)
                finished.extend([event.request_id] if event.finish_reason else [])
        assert engine.loop.stats().num_preemptions > 0
    finally:
        engine.close()
    assert finished.index(str(len(LENGTHS) - 1)) < len(LENGTHS) // 2, finished
    for at, answer in enumerate(greedy):
        assert tuple(tokens[str(at)]) == answer.token_ids
        assert logprob_gap(logprobs[str(at)], answer.logprobs) < TOLERANCE
