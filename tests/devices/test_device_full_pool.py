"""A pool that is always nearly full, on a GPU: everybody is answered, as if there were room for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mixed_traffic import assert_same_answers, draw_visitors, run
from tiny_llm import VOCAB_SIZE, make_tiny

from lockstep.engine.assembly import Engine

pytestmark = pytest.mark.suite("cuda-1", "rocm-1", "musa-1", seconds=60)


def test_mixed_requests_in_a_full_pool(suite_platform: str, tmp_path: Path) -> None:
    make_tiny(tmp_path, max_position_embeddings=1024, num_hidden_layers=1)
    visitors = draw_visitors(200, VOCAB_SIZE, seed=20)
    options: dict[str, Any] = {
        "model": str(tmp_path),
        "device": suite_platform,
        "dtype": "float32",
        "page_size": 8,
        "context_length": 1024,
        "schedule_policy": "priority",
        "max_running_requests": 128,
    }
    full, roomy = (Engine({**options, "max_total_tokens": tokens}) for tokens in (4096, 256 * 1024))
    try:
        found = run(full.loop, visitors)
        assert_same_answers(roomy.loop, visitors, found, run(roomy.loop, visitors))
    finally:
        full.close()
        roomy.close()
    assert found.num_preemptions > 0 and found.mean_fill > 0.8
