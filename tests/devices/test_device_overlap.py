"""Steps that are submitted before the last one's result is taken, on devices that really run later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_llm import assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import Grammar, SamplingParams

pytestmark = pytest.mark.suite("cuda-1", "rocm-1", "musa-1", seconds=120)

TOLERANCE = 2e-3
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9},
    {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logit_bias": {65: 3.0}, "min_tokens": 20, "stop_token_ids": (1, 2, 3)},
    {"temperature": 1.0, "grammar": Grammar("regex", "[a-f]{12}")},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 1.0, "n": 2},
]
LENGTHS = (1, 3, 17, 40, 100, 9, 33, 5)


def all_kinds() -> list[SamplingParams]:
    return [
        SamplingParams(seed=at, max_tokens=24 + at, ignore_eos=True, logprobs=1, **kind)
        for at, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize("pool", [4096, 200], ids=["room for all", "preemptions"])
def test_overlap_changes_no_answer(suite_platform: str, tmp_path: Path, pool: int) -> None:
    make_tiny(tmp_path, "qwen3")
    prompts = random_prompts(LENGTHS)
    with open_tiny(tmp_path, device="cpu") as llm:
        expected = llm.generate(prompts, all_kinds())
    options: dict[str, Any] = {"device": suite_platform, "max_total_tokens": pool, "chunked_prefill_size": 64}
    for overlap in ("off", "on"):
        with open_tiny(tmp_path, overlap=overlap, **options) as llm:
            for _ in range(2):
                assert_same(llm.generate(prompts, all_kinds()), expected, TOLERANCE)
            assert (llm.stats().num_preemptions > 0) == (pool == 200)


def test_overlap_is_what_such_a_device_gets(suite_platform: str, tmp_path: Path) -> None:
    make_tiny(tmp_path)
    with open_tiny(tmp_path, device=suite_platform) as llm:
        assert llm.config.scheduler.overlap == "on"
        (why,) = [decision.why for decision in llm.decisions if decision.name == "overlap"]
        assert "while the device computes" in why
