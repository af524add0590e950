"""Random traffic for a long time: other seeds every night, a million steps in all."""

from __future__ import annotations

import secrets

import pytest
from test_scheduler_random import STEPS_PER_EPISODE, run_episodes

pytestmark = pytest.mark.suite("cpu", stage="nightly", seconds=150)

STEPS_EACH = 125_000


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("quarter", range(4))
def test_random_traffic_for_long(quarter: int, overlap: bool) -> None:
    first_seed = secrets.randbelow(2**31)
    print(f"seeds from {first_seed}")
    seen = run_episodes(STEPS_EACH, first_seed, overlap=overlap)
    print(dict(seen))
    assert seen["preemptions"] > STEPS_EACH // STEPS_PER_EPISODE and seen["hit tokens"] > STEPS_EACH // 4
