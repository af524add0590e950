"""Two devices answer like one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_llm import assert_same, make_tiny, open_tiny, random_prompts

from lockstep.core.errors import EngineDead
from lockstep.core.sampling import SamplingParams

pytestmark = pytest.mark.suite("cuda-2", "musa-2", exclusive=True, seconds=90)

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=2)
TOLERANCE = 2e-3
"""Of log-probabilities, which each rank's part of a product changes in its last bits."""


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "vocab_size": 263}),
        ("qwen3", {}),
        ("gemma3", {"intermediate_size": 97}),
    ],
)
def test_two_ranks_answer_like_one(
    architecture: str, overrides: dict[str, Any], suite_platform: str, tmp_path: Path
) -> None:
    make_tiny(tmp_path, architecture, **overrides)
    prompts = random_prompts((1, 5, 40))
    with open_tiny(tmp_path, device=suite_platform) as llm:
        expected = llm.generate(prompts, PARAMS)
    with open_tiny(tmp_path, device=suite_platform, tp=2) as llm:
        assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)
        llm.flush_cache()
        assert_same(llm.generate(prompts, PARAMS), expected, TOLERANCE)


def test_a_killed_worker_ends_the_engine_with_a_clear_error(suite_platform: str, tmp_path: Path) -> None:
    """Devices wait for a peer without end: the watch over the workers breaks that off."""
    make_tiny(tmp_path)
    with open_tiny(tmp_path, device=suite_platform, tp=2) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
        next(stream)
        (worker,) = [
            child for child in psutil.Process().children() if "lockstep.engine.worker_main" in child.cmdline()
        ]
        worker.kill()
        begin_s = time.monotonic()
        with pytest.raises(EngineDead, match="worker process of rank 1 ended with code -9"):
            list(stream)
        assert time.monotonic() - begin_s < 20
