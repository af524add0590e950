"""Our histogram beside the format's own library."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram

from lockstep.server.metrics import Histogram

pytestmark = pytest.mark.suite("cpu", seconds=1)

BOUNDS = (0.001, 0.0025, 0.1, 1.0, 30.0)


def lines(registry: CollectorRegistry) -> list[str]:
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if "_created" not in line]


@pytest.mark.parametrize("num_values", [0, 1, 500])
def test_a_histogram_reads_like_the_librarys(num_values: int) -> None:
    seed = 5 + num_values
    print("seed", seed)
    draws = random.Random(seed)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = Histogram("lockstep_some_seconds", "Some time.", BOUNDS)
    ours.register(own)
    library = LibraryHistogram("lockstep_some_seconds", "Some time.", buckets=BOUNDS, registry=theirs)
    for _ in range(num_values):
        value = draws.choice([*BOUNDS, 0.0, 99.0, draws.expovariate(1.0)])
        own.observe(value)
        library.observe(value)
    assert lines(ours) == lines(theirs)
