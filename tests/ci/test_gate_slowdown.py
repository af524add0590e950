"""Student's distribution against published tables; the limit against machines whose noise is known."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lockstep.ci.gates.slowdown import (
    FALSE_ALARM,
    MUST_CATCH,
    SMALLEST_LIMIT,
    Spread,
    student_t_cdf,
    student_t_quantile,
)

pytestmark = pytest.mark.suite("cpu", seconds=3)

T_TABLE = {
    1: (6.314, 12.706, 31.821, 318.309),
    2: (2.920, 4.303, 6.965, 22.327),
    3: (2.353, 3.182, 4.541, 10.215),
    4: (2.132, 2.776, 3.747, 7.173),
    5: (2.015, 2.571, 3.365, 5.893),
    6: (1.943, 2.447, 3.143, 5.208),
    9: (1.833, 2.262, 2.821, 4.297),
    14: (1.761, 2.145, 2.624, 3.787),
    19: (1.729, 2.093, 2.539, 3.579),
    30: (1.697, 2.042, 2.457, 3.385),
}
"""Degrees of freedom -> the 95, 97.5, 99 and 99.9% quantiles, as statistics textbooks print them."""


@pytest.mark.parametrize(("degrees", "quantiles"), T_TABLE.items())
def test_quantiles_against_the_published_table(degrees: int, quantiles: tuple[float, ...]) -> None:
    found = [student_t_quantile(probability, degrees) for probability in (0.95, 0.975, 0.99, 0.999)]
    assert found == pytest.approx(quantiles, abs=6e-4)


def test_the_distribution_is_one() -> None:
    for degrees in (1, 2, 3, 8, 25):
        assert student_t_cdf(0.0, degrees) == pytest.approx(0.5)
        assert student_t_cdf(-1.3, degrees) == pytest.approx(1 - student_t_cdf(1.3, degrees))
        values = [student_t_cdf(t / 10, degrees) for t in range(-100, 101)]
        assert values == sorted(values) and 0 < values[0] < values[-1] < 1
    assert student_t_cdf(1.0, 1) == pytest.approx(0.75)  # Cauchy's distribution
    assert student_t_cdf(1.96, 2000) == pytest.approx(statistics.NormalDist().cdf(1.96), abs=1e-4)


def test_the_spread_is_that_of_shares() -> None:
    """In milliseconds it is what it is in seconds."""
    seconds, milliseconds = Spread.of([2.0, 2.2, 1.8]), Spread.of([2000.0, 2200.0, 1800.0])
    assert (seconds.median_s, seconds.num_runs) == (2.0, 3)
    assert milliseconds.deviation == pytest.approx(seconds.deviation) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    "times", [[], [1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]]
)
def test_times_that_are_none(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"runs show no spread|positive numbers"):
        Spread.of(times)


def test_the_limit_comes_from_the_spread() -> None:
    quiet, noisy = Spread(1.0, 0.001, 5), Spread(1.0, 0.02, 5)
    assert quiet.limit(5) == SMALLEST_LIMIT
    # By hand: 7.173 * sqrt(pi / 2) * 2% * sqrt(2 / 5), as a logarithm.
    assert math.log(noisy.limit(5)) == pytest.approx(0.11371, abs=1e-4)
    assert noisy.limit(20) < noisy.limit(5) and Spread(1.0, 0.02, 20).limit(20) < noisy.limit(20)
    assert noisy.catches(5) > noisy.limit(5)


def test_how_many_runs_would_do() -> None:
    noisy = Spread(1.0, 0.03, 3)
    enough = noisy.runs_to_catch()
    assert enough is not None and noisy.catches(3) > MUST_CATCH
    assert (
        Spread(1.0, 0.03, enough).catches(enough)
        <= MUST_CATCH
        < Spread(1.0, 0.03, enough - 1).catches(enough - 1)
    )
    assert Spread(1.0, 0.5, 3).runs_to_catch() is None


class Machine:
    """Times of one second: noise of so many per cent, and a share of runs that something disturbs by up to a fifth."""

    def __init__(self, seed: int, noise: float, disturbed: float) -> None:
        self._draws = random.Random(seed)
        self._noise, self._disturbed = noise, disturbed

    def times_s(self, num_runs: int, slowdown: float = 1.0) -> list[float]:
        return [slowdown * self._one() for _ in range(num_runs)]

    def _one(self) -> float:
        time_s = math.exp(self._draws.gauss(0.0, self._noise))
        if self._draws.random() < self._disturbed:
            time_s *= 1 + 0.2 * self._draws.random()
        return time_s


MACHINES = [(3, 0.004, 0.0), (5, 0.01, 0.0), (5, 0.01, 0.05), (7, 0.02, 0.0), (7, 0.02, 0.05), (10, 0.03, 0.05)]


@pytest.mark.parametrize(("num_runs", "noise", "disturbed"), MACHINES)
def test_unchanged_runs_pass_and_a_slowdown_of_15_percent_does_not(
    num_runs: int, noise: float, disturbed: float
) -> None:
    """On every baseline that is wide enough to be refused nothing is claimed; enough must be left."""
    seed = 2
    print(f"seed {seed}")
    machine = Machine(seed, noise, disturbed)
    num_recorded = num_passed = num_caught = 0
    for _ in range(400):
        baseline = Spread.of(machine.times_s(num_runs))
        if baseline.catches(num_runs) > MUST_CATCH:
            continue
        limit_s = baseline.limit(num_runs) * baseline.median_s
        unchanged = [statistics.median(machine.times_s(num_runs)) for _ in range(20)]
        num_recorded += 1
        num_passed += max(unchanged) <= limit_s
        num_caught += statistics.median(machine.times_s(num_runs, MUST_CATCH)) > limit_s
    print(f"{num_recorded} of 400 recorded; 20 unchanged passed: {num_passed}, slow-down caught: {num_caught}")
    assert num_recorded > 100
    assert num_passed / num_recorded > 0.95
    assert num_caught / num_recorded > 0.95


def test_chance_alone_exceeds_the_limit_as_rarely_as_promised() -> None:
    """Without the smallest limit and without refusals: the t limit itself, on a noisy machine."""
    seed = 3
    print(f"seed {seed}")
    machine = Machine(seed, 0.05, 0.0)
    alarms = 0
    for _ in range(5_000):
        baseline = Spread.of(machine.times_s(5))
        if baseline.limit(5) > SMALLEST_LIMIT:
            alarms += statistics.median(machine.times_s(5)) > baseline.limit(5) * baseline.median_s
    assert 0 < alarms / 5_000 < 3 * FALSE_ALARM


def test_a_noisy_machine_is_refused() -> None:
    machine = Machine(4, 0.10, 0.0)
    assert all(Spread.of(machine.times_s(5)).catches(5) > MUST_CATCH for _ in range(50))
