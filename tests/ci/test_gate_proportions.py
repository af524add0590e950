"""Shares and paired comparisons against published tables, enumeration and exact probabilities."""

from __future__ import annotations

import itertools
import math

import pytest

from lockstep.ci.gates.proportions import (
    fewest_significant_losses,
    mcnemar_p,
    questions_to_decide,
    wilson_interval,
)

pytestmark = pytest.mark.suite("cpu", seconds=3)

NEWCOMBE = {
    (81, 263): (0.2553, 0.3662),
    (15, 148): (0.0624, 0.1605),
    (0, 20): (0.0000, 0.1611),
    (1, 29): (0.0061, 0.1718),
}
"""Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""

SIGN_TEST = {6: 0, 8: 0, 9: 1, 11: 1, 12: 2, 15: 3, 17: 4, 20: 5, 23: 6, 25: 7}
"""Pairs -> the largest smaller count that is significant at 5%, two-sided: the usual table of the sign test."""


@pytest.mark.parametrize(("counts", "limits"), NEWCOMBE.items())
def test_wilson_against_the_published_table(counts: tuple[int, int], limits: tuple[float, float]) -> None:
    interval = wilson_interval(*counts)
    assert (interval.low, interval.high) == pytest.approx(limits, abs=5e-5)


def test_wilson_mirrors_and_stays_a_share() -> None:
    for num_asked in (1, 2, 7, 20, 1319):
        for num_right in range(num_asked + 1):
            one, other = (
                wilson_interval(num_right, num_asked),
                wilson_interval(num_asked - num_right, num_asked),
            )
            assert 0 <= one.low <= num_right / num_asked <= one.high <= 1 and one.low < one.high
            assert one.low == pytest.approx(1 - other.high)
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(0, 0)


def exact_probability(num_right: int, num_asked: int, share: float) -> float:
    """Binomial, by logarithms of factorials: another route than the interval's."""
    ways = math.lgamma(num_asked + 1) - math.lgamma(num_right + 1) - math.lgamma(num_asked - num_right + 1)
    return math.exp(ways + num_right * math.log(share) + (num_asked - num_right) * math.log1p(-share))


@pytest.mark.parametrize(("num_asked", "luck"), [(20, 0.06), (100, 0.045), (400, 0.035), (1319, 0.03)])
def test_a_model_at_the_threshold_rarely_passes_or_fails(num_asked: int, luck: float) -> None:
    """Were the mean compared with the threshold, half of such runs would pass."""
    for percent in range(10, 100, 10):
        share = percent / 100
        intervals = [wilson_interval(num_right, num_asked) for num_right in range(num_asked + 1)]
        weights = [exact_probability(num_right, num_asked, share) for num_right in range(num_asked + 1)]
        assert sum(weights) == pytest.approx(1)
        passes = sum(w for w, i in zip(weights, intervals, strict=True) if i.low >= share)
        fails = sum(w for w, i in zip(weights, intervals, strict=True) if i.high <= share)
        by_mean = sum(w for right, w in enumerate(weights) if right / num_asked >= share)
        assert passes < luck and fails < luck and by_mean > 0.4, (share, passes, fails)


@pytest.mark.parametrize(
    ("share", "threshold"), [(0.55, 0.5), (0.5, 0.55), (0.0, 0.3), (1.0, 0.8), (0.61, 0.6)]
)
def test_the_number_of_questions_that_decide(share: float, threshold: float) -> None:
    needed = questions_to_decide(share, threshold)
    assert needed is not None
    assert wilson_interval(share * needed, needed).excludes(threshold)
    assert needed == 1 or not wilson_interval(share * (needed - 1), needed - 1).excludes(threshold)


def test_no_number_of_questions_tells_a_share_from_itself() -> None:
    assert questions_to_decide(0.6, 0.6) is None


def test_mcnemar_against_every_way_that_coins_can_fall() -> None:
    for num_differing in range(11):
        tosses = [sum(coins) for coins in itertools.product((0, 1), repeat=num_differing)]
        for num_lost in range(num_differing + 1):
            distance = abs(num_lost - num_differing / 2)
            as_uneven = sum(abs(heads - num_differing / 2) >= distance for heads in tosses)
            assert mcnemar_p(num_lost, num_differing - num_lost) == pytest.approx(as_uneven / len(tosses))


def test_mcnemar_of_a_known_example() -> None:
    """Agresti, Categorical Data Analysis, approval of a minister in two surveys: 150 and 86 changed their mind."""
    assert mcnemar_p(150, 86) == pytest.approx(3.716e-5, rel=1e-4) == mcnemar_p(86, 150)
    assert 0 <= mcnemar_p(700, 619) <= 1


@pytest.mark.parametrize(("num_pairs", "smaller"), SIGN_TEST.items())
def test_significance_against_the_table_of_the_sign_test(num_pairs: int, smaller: int) -> None:
    assert mcnemar_p(smaller, num_pairs - smaller) < 0.05
    assert mcnemar_p(smaller + 1, num_pairs - smaller - 1) >= 0.05


def test_the_fewest_losses_that_show() -> None:
    assert [fewest_significant_losses(gained, 0.05) for gained in (0, 1, 2, 3)] == [6, 8, 10, 12]
