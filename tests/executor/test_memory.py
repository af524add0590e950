"""How many pages fit beside weights and steps, and what is said when too few do."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from lockstep.core.errors import OutOfMemory
from lockstep.executor.memory import PoolBudget, StepMemory

pytestmark = pytest.mark.suite("cpu", seconds=1)

GIB = 2**30
PAGE_BYTES = 2 * 2**20
BUDGET = PoolBudget(
    free_bytes=60 * GIB,
    total_bytes=80 * GIB,
    fraction=0.9,
    step=StepMemory(workspace_bytes=4 * GIB, graph_bytes=GIB),
    page_bytes=PAGE_BYTES,
    weight_bytes=16 * GIB,
    chunk_tokens=8192,
    num_ranks=1,
    possible_ranks=(1, 2, 4, 8),
)


def changed(**changes: Any) -> PoolBudget:
    return dataclasses.replace(BUDGET, **changes)


def test_pages_take_what_weights_steps_and_the_rest_leave() -> None:
    # 60 free, of which 10 % of 80 stay free and 5 go to the steps.
    assert BUDGET.num_pages(at_least=16) == (60 - 8 - 5) * GIB // PAGE_BYTES
    assert changed(free_bytes=60 * GIB - 1).num_pages(16) == BUDGET.num_pages(16) - 1


@pytest.mark.parametrize("free_gib", [9.0, 10.5, 11.5, 12.5, 13.0])
def test_what_is_proposed_would_fit(free_gib: float) -> None:
    tight = changed(free_bytes=int(free_gib * GIB))
    with pytest.raises(OutOfMemory) as caught:
        tight.num_pages(at_least=16)
    text = str(caught.value)
    missing = re.match(r"([\d.]+) GiB are missing", text)
    assert missing is not None and "\n" not in text
    assert float(missing[1]) == pytest.approx(13 - free_gib + 16 * PAGE_BYTES / GIB, abs=0.01)
    found = dict(re.findall(r"--([a-z-]+) ([\d.]+)", text))
    assert "mem-fraction-static" in found or free_gib < 10
    if "mem-fraction-static" in found:
        assert dataclasses.replace(tight, fraction=float(found["mem-fraction-static"])).num_pages(16) >= 16
    if "chunked-prefill-size" in found:
        share = int(found["chunked-prefill-size"]) / tight.chunk_tokens
        step = StepMemory(workspace_bytes=int(4 * GIB * share), graph_bytes=GIB)
        assert dataclasses.replace(tight, step=step).num_pages(16) >= 16
    ranks = int(found["tp"])
    freed = tight.weight_bytes - tight.weight_bytes // ranks
    assert dataclasses.replace(tight, free_bytes=tight.free_bytes + freed).num_pages(16) >= 16


def test_nothing_is_proposed_that_cannot_help() -> None:
    hopeless = changed(free_bytes=0, fraction=0.97, possible_ranks=(1,))
    with pytest.raises(OutOfMemory, match="what would fit: a smaller model"):
        hopeless.num_pages(16)
