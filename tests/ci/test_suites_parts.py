"""Sharing out: every job in exactly one part, the same whatever the order, and never far from the best."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.ci.parts import Durations, Job, enough_parts, load_durations, partition, pick_part, total_s
from lockstep.core.errors import ConfigError

pytestmark = pytest.mark.suite("cpu")


def jobs_of(seconds: list[float]) -> list[Job]:
    return [Job("cpu", f"tests/test_{number}.py", each) for number, each in enumerate(seconds)]


SECONDS = st.lists(st.floats(0.01, 1000, allow_nan=False), max_size=40)


@given(SECONDS, st.integers(1, 12), st.randoms(use_true_random=False))
def test_every_job_is_in_exactly_one_part_whatever_the_order(
    seconds: list[float], num_parts: int, shuffler: random.Random
) -> None:
    jobs = jobs_of(seconds)
    parts = partition(jobs, num_parts)
    assert len(parts) == num_parts
    assert Counter(itertools.chain(*parts)) == Counter(jobs)
    shuffler.shuffle(jobs)
    assert partition(jobs, num_parts) == parts
    assert [pick_part(jobs, number, num_parts) for number in range(num_parts)] == list(parts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_the_longest_part_keeps_grahams_bound(seconds: list[int], num_parts: int) -> None:
    """Against the best of all ways to share out."""
    found = max(map(total_s, partition(jobs_of(list(map(float, seconds))), num_parts)))
    best = min(
        max(
            sum(length for length, at in zip(seconds, places, strict=True) if at == part)
            for part in range(num_parts)
        )
        for places in itertools.product(range(num_parts), repeat=len(seconds))
    )
    assert best <= found <= (4 / 3 - 1 / (3 * num_parts)) * best + 1e-9


@given(SECONDS, st.floats(0.1, 2000))
def test_enough_parts_keep_the_limit_and_none_is_empty(seconds: list[float], limit: float) -> None:
    jobs = jobs_of(seconds)
    num_parts = enough_parts(jobs, limit)
    parts = partition(jobs, num_parts)
    longest_job = max(seconds, default=0.0)
    assert max(map(total_s, parts)) <= max(limit, longest_job) + 1e-9
    assert all(parts) or not jobs
    if num_parts > 1:
        assert max(map(total_s, partition(jobs, num_parts - 1))) > max(limit, longest_job)


@pytest.mark.parametrize(("number", "total"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_parts_that_do_not_exist_are_refused(number: int, total: int) -> None:
    with pytest.raises(ConfigError):
        pick_part(jobs_of([1.0]), number, total)


def test_durations_are_kept_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / ".ci" / "durations.json"
    durations = load_durations(path)
    assert durations.get("cpu", "tests/a.py", "per-commit") is None
    for name in ("a", "gone"):
        durations.record("cpu", f"tests/{name}.py", "per-commit", 1.2345)
    durations.keep_only([("cpu", "tests/a.py"), ("sim", "tests/gone.py")])
    durations.save(path)
    assert json.loads(path.read_text()) == {"cpu": {"tests/a.py": {"per-commit": 1.23}}}
    assert load_durations(path) == Durations({"cpu": {"tests/a.py": {"per-commit": 1.23}}})


@pytest.mark.parametrize("text", ["[]", "{", '{"cpu": 3}', '{"cpu": {"a": {"nightly": "fast"}}}', "null"])
def test_a_file_without_durations_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "durations.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--update-durations"):
        load_durations(path)
