"""Prefixes that are read by the step that computes them, on devices: graphs, pieces, and steps that run later."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llm import PAGE_SIZE, assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams

pytestmark = pytest.mark.suite("cuda-1", "rocm-1", "musa-1", seconds=60)

TOLERANCE = 2e-3
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2)
NUM_SHARED = 30 * PAGE_SIZE


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(
    ("chunk", "lengths", "beside"),
    [(4096, (1, 7, 40, 1, 90), 0), (64, (1, 7, 40, 1, 90), 0), (NUM_SHARED - 1, (1, 1, 1), 1)],
    ids=["one step", "chunks", "single tokens"],
)
def test_prompts_that_arrive_together(
    suite_platform: str, tmp_path: Path, chunk: int, lengths: tuple[int, ...], beside: int, overlap: str
) -> None:
    """The last chunk size leaves one token of the prefix: as many prompts as start `beside` it compute the page that it
    fills themselves, so that a step of single tokens would be right, and the others read it in the next step."""
    make_tiny(tmp_path, "qwen3")
    prefix, *tails = random_prompts((NUM_SHARED, *lengths), seed=29)
    prompts = [prefix, *([*prefix, *tail] for tail in tails)]
    with open_tiny(tmp_path, device="cpu", disable_radix_cache=True) as llm:
        expected = [llm.generate([prompt], PARAMS)[0] for prompt in prompts]
    with open_tiny(tmp_path, device=suite_platform, overlap=overlap, chunked_prefill_size=chunk) as llm:
        for _ in range(3):
            found = llm.generate(prompts, PARAMS)
            assert_same(found, expected, TOLERANCE)
            hits = [NUM_SHARED - PAGE_SIZE] * beside + [NUM_SHARED] * (len(tails) - beside)
            assert [answer.num_cached_tokens for answer in found] == [0, *hits]
            assert llm.flush_cache() > 0
