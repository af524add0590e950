"""Statistics of right and wrong answers: what a share tells, and whether two runs differ. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
"""Of every interval, two-sided: a limit on one side is wrong in about 2.5% of all measurements."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The shares, from `low` to `high`, that agree with what was seen."""

    low: float
    high: float

    def excludes(self, share: float) -> bool:
        """True when `share` lies outside, or on the border."""
        return share <= self.low or share >= self.high


def wilson_interval(num_right: float, num_asked: int, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a share: all p whose distance to the one seen is within z standard errors *of p*.

    Unlike the textbook interval around the mean it holds for small counts and shares near 0 and 1. `num_right` may be
    a fraction, for planning. Wilson, JASA 22 (1927) 209-212. Raises ValueError without questions.
    """
    if num_asked < 1 or not 0 <= num_right <= num_asked:
        raise ValueError(f"{num_right:g} right of {num_asked} asked is no share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / num_asked
    scale = 1 + z * z / num_asked
    middle = (share + z * z / (2 * num_asked)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_asked + z * z / (4 * num_asked**2))
    low = 0.0 if num_right == 0 else max(middle - half, 0.0)
    high = 1.0 if num_right == num_asked else min(middle + half, 1.0)
    return Interval(low, high)


def questions_to_decide(share: float, threshold: float, confidence: float = CONFIDENCE) -> int | None:
    """The fewest questions whose interval excludes `threshold`, should `share` of them be right.

    It does once the share is z standard errors of the threshold away. None when the share is the threshold.
    """
    if share == threshold:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return max(1, math.ceil(threshold * (1 - threshold) * (z / (share - threshold)) ** 2))


def mcnemar_p(num_lost: int, num_gained: int) -> float:
    """The exact two-sided p-value of a change that lost and gained so many answers.

    Were both runs equally good, each question on which they differ would fall on either side like a fair coin; p is
    the probability of a split at least as uneven. Questions on which they agree say nothing. McNemar, Psychometrika
    12 (1947) 153-157, in the exact binomial form. Raises ValueError for negative counts.
    """
    if min(num_lost, num_gained) < 0:
        raise ValueError("counts of questions are not negative")
    num_differing = num_lost + num_gained
    tail = sum(math.comb(num_differing, count) for count in range(min(num_lost, num_gained) + 1))
    return min(1.0, float(2 * tail / 2**num_differing))


def fewest_significant_losses(num_gained: int, significance: float) -> int:
    """The smallest number of lost answers that, against so many gained, has a p-value below `significance`."""
    num_lost = num_gained
    while mcnemar_p(num_lost, num_gained) >= significance:
        num_lost += 1
    return num_lost
