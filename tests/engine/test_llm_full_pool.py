"""A pool of pages that is always nearly full: everybody is answered, as if there were room for all."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from mixed_traffic import Record, assert_same_answers, draw_visitors, run
from tiny_llm import VOCAB_SIZE, make_tiny

from lockstep.engine.assembly import Engine

pytestmark = pytest.mark.suite("cpu", seconds=20)

CONTEXT_LENGTH = 1024
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "page_size": 8,
    "context_length": CONTEXT_LENGTH,
    "schedule_policy": "priority",
    "max_running_requests": 256,
}
FULL, ROOMY = 4096, 256 * CONTEXT_LENGTH
"""Tokens of a pool for some ten requests, and of one for all that may run."""


def compare(directory: Path, num_requests: int) -> Record:
    make_tiny(directory, max_position_embeddings=CONTEXT_LENGTH, num_hidden_layers=1)
    visitors = draw_visitors(num_requests, VOCAB_SIZE, seed=secrets.randbelow(2**31))
    full = Engine({"model": str(directory), "max_total_tokens": FULL, **OPTIONS})
    roomy = Engine({"model": str(directory), "max_total_tokens": ROOMY, **OPTIONS})
    try:
        found, expected = run(full.loop, visitors), run(roomy.loop, visitors)
        assert_same_answers(roomy.loop, visitors, found, expected)
    finally:
        full.close()
        roomy.close()
    print(f"preemptions {found.num_preemptions}, mean fill {found.mean_fill:.3f}, steps {found.num_steps}")
    assert expected.num_preemptions == 0
    return found


def test_a_few_hundred_mixed_requests_in_a_full_pool(tmp_path: Path) -> None:
    found = compare(tmp_path, 250)
    assert found.num_preemptions > 0 and found.mean_fill > 0.8 and max(found.fill) > 0.97


@pytest.mark.suite("cpu", stage="nightly", seconds=80)
def test_a_thousand_mixed_requests_in_a_full_pool(tmp_path: Path) -> None:
    found = compare(tmp_path, 1000)
    assert found.num_preemptions > 10 and found.mean_fill > 0.8 and max(found.fill) > 0.98
