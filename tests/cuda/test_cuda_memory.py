"""The memory of a GPU: the pool takes what measured steps leave, and real steps stay within it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep.core.sampling import SamplingParams

pytestmark = pytest.mark.suite("cuda-1", seconds=60)

FRACTION = 0.3
SLACK_BYTES = 2**30
"""Contexts, libraries and fragments of an allocator that keeps what it has."""


ATTEMPTS = 3
"""What other processes take of the card while one attempt measures counts as its own."""


def test_large_steps_stay_within_the_fraction(tmp_path: Path) -> None:
    make_tiny(tmp_path, max_position_embeddings=4096)
    for left in reversed(range(ATTEMPTS)):
        try:
            return check(tmp_path)
        except AssertionError:
            if not left:
                raise


def check(tmp_path: Path) -> None:
    options = {"max_total_tokens": "auto", "threads": 4}
    with open_tiny(
        tmp_path, device="cuda", mem_fraction_static=FRACTION, max_running_requests=64, **options
    ) as llm:
        parts = {line.name: line for line in llm.memory_report()}
        total_bytes = llm._engine.opened.capabilities.memory_bytes
        own = sum(line.bytes for line in parts.values() if line.is_own)
        assert own <= FRACTION * total_bytes + SLACK_BYTES
        assert parts["workspace"].bytes > 0 and parts["KV pool"].bytes > 0.1 * total_bytes
        prompts = random_prompts([4000] + [120] * 63)
        params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=32, ignore_eos=True, seed=1)
        llm.generate(prompts, params)
        free = {line.name: line for line in llm.memory_report()}["free now"]
        assert free.bytes >= (1 - FRACTION) * total_bytes - SLACK_BYTES - parts["others"].bytes
