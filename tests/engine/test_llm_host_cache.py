"""Cached prefixes in host memory: the same answers, less to compute."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counted_rows import counting
from mixed_traffic import assert_same_answers, draw_visitors, run
from tiny_llm import PAGE_SIZE, VOCAB_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.errors import ConfigError
from lockstep.core.sampling import SamplingParams
from lockstep.engine.assembly import Engine

pytestmark = pytest.mark.suite("cpu", seconds=30)

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
SMALL_POOL = {"max_total_tokens": 60 * PAGE_SIZE}
ONE_MIB = 1 / 1024
"""Of host memory: 256 pages of 4 tokens of a tiny model with 2 layers in float32."""


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_prefixes_come_back_and_are_not_computed_again(tmp_path: Path, device: str) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts([150, 140, 130, 120])
    with open_tiny(tmp_path, device=device) as plain:
        expected = [plain.generate([prompt], PARAMS)[0] for prompt in prompts]
    with open_tiny(tmp_path, device=device, host_cache_size=ONE_MIB, **SMALL_POOL) as llm:
        counter = counting(llm)
        assert_same([llm.generate([prompt], PARAMS)[0] for prompt in prompts], expected)
        assert llm.stats().num_host_cached_tokens == 0 and llm.stats().num_host_pages_cached > 0
        for prompt, answer in zip(prompts, expected, strict=True):
            rows_before, from_host_before = counter.num_rows, llm.stats().num_host_cached_tokens
            again = llm.generate([prompt], PARAMS)[0]
            assert_same([again], [answer])
            num_hit = (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE
            assert again.num_cached_tokens == num_hit
            assert llm.stats().num_host_cached_tokens > from_host_before
            # The rest of the prompt, and each new token but the last.
            assert counter.num_rows - rows_before == len(prompt) - num_hit + 7
        llm.flush_cache()
        assert llm.stats().num_host_pages_cached == llm.stats().num_pages_cached == 0
        assert llm.generate([prompts[0]], PARAMS)[0].num_cached_tokens == 0
        llm._engine.loop.core.scheduler.check()


def test_without_it_they_are_computed_again(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts([150, 140, 130, 120])
    with open_tiny(tmp_path, **SMALL_POOL) as llm:
        for _ in range(2):
            assert [llm.generate([prompt], PARAMS)[0].num_cached_tokens for prompt in prompts] == [0] * 4
        assert llm.stats().num_host_pages_total == 0


def test_mixed_requests_in_a_full_pool_with_a_small_host_cache(tmp_path: Path) -> None:
    make_tiny(tmp_path, max_position_embeddings=1024, num_hidden_layers=1)
    visitors = draw_visitors(150, VOCAB_SIZE, seed=secrets.randbelow(2**31))
    options: dict[str, Any] = {
        "model": str(tmp_path),
        "dtype": "float32",
        "threads": 1,
        "page_size": 8,
        "context_length": 1024,
        "schedule_policy": "priority",
        "max_running_requests": 128,
    }
    cached = Engine({**options, "max_total_tokens": 2048, "host_cache_size": 0.001})
    roomy = Engine({**options, "max_total_tokens": 128 * 1024})
    try:
        found = run(cached.loop, visitors)
        assert_same_answers(roomy.loop, visitors, found, run(roomy.loop, visitors))
        stats = cached.loop.core.scheduler.stats()
    finally:
        cached.close()
        roomy.close()
    assert stats.num_host_cached_tokens > 500 and found.num_preemptions > 0


def test_choices_share_what_came_back(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts([150, 140, 130])
    with open_tiny(tmp_path, host_cache_size=ONE_MIB, **SMALL_POOL) as llm:
        once = [llm.generate([prompt], PARAMS)[0] for prompt in prompts]
        twice = llm.generate([prompts[0]], replace(PARAMS, n=2))[0]
    assert {choice.token_ids for choice in twice.choices} == {once[0].token_ids}


def test_a_cache_of_nothing_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with pytest.raises(ConfigError, match="--host-cache-size 1 keeps cached prefixes"):
        open_tiny(tmp_path, host_cache_size=1, disable_radix_cache=True)
