"""The real model in float32: prefix hits, chunks, company, preemption and two ranks change nothing but roundings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tiny_llm import assert_same

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM, Completion

pytestmark = pytest.mark.suite("cpu")

FLOAT32: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_total_tokens": 4096}
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "To make a good cup of tea, you should first warm the pot, then",
    "In the year 1666, the city of London was struck by",
    "A list of the first ten prime numbers:",
    " ".join(f"Line {number}: the quick brown fox jumps over the lazy dog." for number in range(12)),
]
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2)
# The sums of a wide model come in another order when a batch has another shape.
TOLERANCE = 5e-4
# One reduction over two ranks in every block.
TOLERANCE_OF_RANKS = 1e-3


def alone(params: SamplingParams, **options: Any) -> list[Completion]:
    """Each prompt by itself, nothing cached."""
    with LLM(**FLOAT32, disable_radix_cache=True, **options) as llm:
        return [llm.generate([prompt], params)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[Completion]]:
    yield alone(replace(PARAMS, prompt_logprobs=1))


def without_prompts(answers: list[Completion]) -> list[Completion]:
    return [replace(answer, prompt_logprobs=()) for answer in answers]


@pytest.mark.suite("cpu", stage="nightly", seconds=40)
def test_small_chunks(expected: list[Completion]) -> None:
    assert_same(alone(replace(PARAMS, prompt_logprobs=1), chunked_prefill_size=13), expected, TOLERANCE)


def test_company_then_prefix_hits(expected: list[Completion]) -> None:
    with LLM(**FLOAT32) as llm:
        assert_same(llm.generate(PROMPTS, PARAMS), without_prompts(expected), TOLERANCE)
        again = llm.generate(PROMPTS, PARAMS)
        assert_same(again, without_prompts(expected), TOLERANCE)
        assert again[-1].num_cached_tokens > 100


def test_preemption(expected: list[Completion]) -> None:
    with LLM(**FLOAT32 | {"max_total_tokens": 4 * 50, "page_size": 4}) as llm:
        longest, short = PROMPTS[-1], PROMPTS[:-1]
        answers = llm.generate([longest, *short, *short, *short], PARAMS)
        assert llm.stats().num_preemptions > 0
        wanted = without_prompts(expected)
        assert_same(answers, [wanted[-1], *wanted[:-1] * 3], TOLERANCE)


def test_two_ranks(expected: list[Completion]) -> None:
    """A second process holds half of every layer; the same text comes out."""
    with LLM(**FLOAT32, tp=2) as llm:
        found = llm.generate(PROMPTS, replace(PARAMS, prompt_logprobs=1))
        assert llm.config.parallel.tp == 2
        for answer, twin in zip(found, expected, strict=True):
            print(repr(answer.text))
            assert answer.text == twin.text
        assert_same(found, expected, TOLERANCE_OF_RANKS)
