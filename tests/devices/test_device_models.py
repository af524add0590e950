"""Whole models on a GPU answer as they do on the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llm import assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams

pytestmark = pytest.mark.suite("cuda-1", "rocm-1", "musa-1", seconds=90)

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=2)
TOLERANCE = 2e-3
"""Of log-probabilities. Products may be rounded to ten bits on the way, as TF32 does."""


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_greedy_answers(architecture: str, suite_platform: str, tmp_path: Path) -> None:
    make_tiny(tmp_path, architecture)
    prompts = random_prompts((1, 3, 17, 40, 100))
    with open_tiny(tmp_path, device="cpu") as llm:
        expected = llm.generate(prompts, PARAMS)
    with open_tiny(tmp_path, device=suite_platform) as llm:
        assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)
        assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)


def test_chunks_and_cached_prefixes(suite_platform: str, tmp_path: Path) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts((90, 33))
    with open_tiny(tmp_path, device="cpu") as llm:
        expected = llm.generate(prompts, PARAMS)
    with open_tiny(tmp_path, device=suite_platform, chunked_prefill_size=7) as llm:
        assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)


def test_what_is_sampled_depends_on_the_seed_alone(suite_platform: str, tmp_path: Path) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts((5, 20, 9))
    params = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=16, ignore_eos=True) for number in range(3)
    ]
    with open_tiny(tmp_path, device=suite_platform) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.token_ids) for answer in together}) == 3
