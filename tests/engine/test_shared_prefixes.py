"""Prompts with a common prefix that arrive together: it is computed once, and every answer is what it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from counted_rows import counting
from tiny_llm import PAGE_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM
from lockstep.executor.fused import FusedDecoder

pytestmark = pytest.mark.suite("cpu", seconds=25)

NUM_TOKENS = 12
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
NUM_SHARED = 10 * PAGE_SIZE
PREFIX, *TAILS = random_prompts((NUM_SHARED + 2, 1, 2, 5, 9, 30, 17), seed=23)
PROMPTS = [[*PREFIX, *tail] for tail in TAILS]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param)
    make_tiny(made, request.param)
    return made


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("chunk", [512, 16], ids=["in one step", "in chunks"])
def test_a_common_prefix_is_computed_once(path: Path, device: str, overlap: str, chunk: int) -> None:
    options: dict[str, Any] = {"device": device, "overlap": overlap}
    with open_tiny(path, disable_radix_cache=True, **options) as plain:
        expected = [plain.generate([prompt], PARAMS)[0] for prompt in PROMPTS]
    with open_tiny(path, chunked_prefill_size=chunk, **options) as llm:
        counter = counting(llm)
        found = llm.generate(PROMPTS, PARAMS)
        assert_same(found, expected)
        num_cached = [answer.num_cached_tokens for answer in found]
        assert num_cached == [0, *[NUM_SHARED] * (len(PROMPTS) - 1)]
        num_prompt = sum(map(len, PROMPTS))
        assert counter.num_rows == num_prompt - sum(num_cached) + len(PROMPTS) * (NUM_TOKENS - 1)
        stats = llm.stats()
        assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (num_prompt, sum(num_cached))
        llm._engine.loop.core.scheduler.check()


def test_choices_start_with_their_prompts_last_row(path: Path) -> None:
    """All choices of a request are in its first step: one computes the prompt, the others the rest of a page."""
    params = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    with open_tiny(path) as llm:
        counter = counting(llm)
        found = llm.generate([PREFIX], params)
        assert counter.num_rows == len(PREFIX) + 3 * (len(PREFIX) - NUM_SHARED) + 4 * (NUM_TOKENS - 1)
        assert llm.stats().num_steps == NUM_TOKENS
        scheduler = llm._engine.loop.core.scheduler
        scheduler.check()
    with open_tiny(path, disable_radix_cache=True) as plain:
        assert_same(plain.generate([PREFIX], params), found)


def test_a_whole_decoder_reads_what_its_own_step_stores() -> None:
    """The embedded model, whose native kernel computes all blocks of a step in one call."""
    story = " ".join(f"On day {number} it rained from noon to night." for number in range(20))
    prompts = [
        f"{story} {question}" for question in ("Then", "The river", "On day 20 it", "Nobody", "At last the")
    ]
    with LLM(disable_radix_cache=True, max_total_tokens=4096) as plain:
        assert isinstance(plain._engine.rank.core.executor._model, FusedDecoder)  # type: ignore[attr-defined]
        expected = [plain.generate([prompt], PARAMS)[0] for prompt in prompts]
    with LLM(max_total_tokens=4096) as llm:
        found = llm.generate(prompts, PARAMS)
        assert_same(found, expected, 2e-2)
        assert found[0].num_cached_tokens == 0
        assert all(answer.num_cached_tokens > 200 for answer in found[1:])
