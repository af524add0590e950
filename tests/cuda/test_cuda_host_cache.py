"""Pages that go from a GPU to pinned host memory and come back, beside other work of the GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("engine", "kv")]

from host_copies import mismatches
from tiny_llm import PAGE_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cuda-1", seconds=60)


@pytest.mark.parametrize("round_number", range(5))
def test_copies_are_as_if_made_one_after_the_other(seed: int, round_number: int) -> None:
    platform = load_platform("cuda")
    assert mismatches(platform.device(), platform.new_stream, seed + round_number) == 0


def test_prefixes_come_back_and_answers_stay(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    prompts = random_prompts([150, 140, 130, 120])
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
    with open_tiny(tmp_path, device="cuda", max_total_tokens=60 * PAGE_SIZE, host_cache_size=0.01) as llm:
        expected = [llm.generate([prompt], params)[0] for prompt in prompts]
        for _ in range(3):
            again = [llm.generate([prompt], params)[0] for prompt in prompts]
            assert_same(again, expected, 2e-3)
            assert all(answer.num_cached_tokens > 100 for answer in again)
        assert llm.stats().num_host_cached_tokens > 1000
