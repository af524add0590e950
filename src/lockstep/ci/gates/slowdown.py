"""Statistics of repeated times: how much slower is slower than chance. Pure functions.

Times are compared as logarithms: the noise of a machine is a share of the time, and twice as slow is as far away as
twice as fast. Medians are compared, so that one disturbed run does not decide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

MIN_RUNS = 3
FALSE_ALARM = 0.001
"""Chance that an unchanged stage exceeds its limit in one check: 20 checks of 4 stages pass in 92 of 100 cases even
where the smallest limit, which guards against slow drift, plays no part."""
SMALLEST_LIMIT = 1.05
"""Runs minutes apart do not show how a machine drifts over days; less than this is never called slower."""
MUST_CATCH = 1.15
"""A slow-down that every gate catches."""
POWER = 0.95
"""How surely it does so."""

_MOST_RUNS = 100
_MEDIAN_OVER_MEAN = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for many normal values; for few it is smaller."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated times of one stage: the median in seconds, and the standard deviation of their logarithms."""

    median_s: float
    deviation: float
    num_runs: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Spread:
        """Raises ValueError for fewer than three times, or one that is no positive number."""
        if len(times_s) < MIN_RUNS:
            raise ValueError(f"{len(times_s)} runs show no spread; it takes {MIN_RUNS}")
        if not all(0 < time_s < math.inf for time_s in times_s):
            raise ValueError("times must be positive numbers of seconds")
        deviation = statistics.stdev(math.log(time_s) for time_s in times_s)
        return cls(statistics.median(times_s), deviation, len(times_s))

    def limit(self, num_new_runs: int) -> float:
        """The largest ratio of a new median, of so many runs, to this one that chance explains.

        A one-sided t limit for the difference of two medians, with the deviation known from these runs alone.
        """
        quantile = student_t_quantile(1 - FALSE_ALARM, self.num_runs - 1)
        return max(SMALLEST_LIMIT, math.exp(quantile * self._error(num_new_runs)))

    def catches(self, num_new_runs: int) -> float:
        """The smallest slow-down that exceeds the limit in 95 of 100 checks."""
        quantile = NormalDist().inv_cdf(POWER)
        return self.limit(num_new_runs) * math.exp(quantile * self._error(num_new_runs))

    def runs_to_catch(self, slowdown: float = MUST_CATCH) -> int | None:
        """How many runs, both recorded and checked, catch `slowdown` at this deviation; None when a hundred do not."""
        for num_runs in range(MIN_RUNS, _MOST_RUNS + 1):
            if Spread(self.median_s, self.deviation, num_runs).catches(num_runs) <= slowdown:
                return num_runs
        return None

    def _error(self, num_new_runs: int) -> float:
        """Standard error of the logarithm of a new median over the recorded one."""
        return _MEDIAN_OVER_MEAN * self.deviation * math.sqrt(1 / self.num_runs + 1 / num_new_runs)


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) of Student's distribution, by its finite series for whole degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4. Raises ValueError for less than one degree.
    """
    if degrees < 1:
        raise ValueError("Student's distribution has at least one degree of freedom")
    angle = math.atan2(abs(t), math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for factor in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (factor - 1) / factor
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return 0.5 + math.copysign(inside / 2, t)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t below which `probability`, at least one half, lies; by bisection of the distribution."""
    if not 0.5 <= probability < 1:
        raise ValueError("a probability from one half to one was expected")
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if student_t_cdf(middle, degrees) >= probability else (middle, high)
    return high
