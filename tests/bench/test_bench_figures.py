"""Percentiles, spreads, targets and rounds, against numpy and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lockstep.bench.comparison import agreement, decode_rates
from lockstep.bench.contender import Round
from lockstep.bench.figures import Figure, Spread, percentile
from lockstep.bench.report import figure_table, shown

pytestmark = pytest.mark.suite("cpu")


def test_percentiles_are_numpys() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        values = [rng.lognormvariate(0, 2) for _ in range(rng.randrange(1, 50))]
        for percent in (0, 50, 90, 99, 100, rng.uniform(0, 100)):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_no_values_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


@pytest.mark.parametrize(
    ("higher", "own", "other", "advantage", "reached"),
    [
        (True, [100.0, 90.0, 120.0], [50.0, 30.0, 50.0], 2.4, True),
        (True, [100.0, 90.0, 120.0], [60.0, 50.0, 70.0], 1.714, False),
        (False, [1.0, 2.0], [2.0, 5.0], 2.25, True),
        (False, [2.0, 2.0], [1.0, 1.0], 0.5, False),
    ],
)
def test_advantage_pairs_rounds(
    higher: bool, own: list[float], other: list[float], advantage: float, reached: bool
) -> None:
    figure = Figure(
        name="f", unit="s", values={"own": own, "other": other}, higher_is_better=higher, times_better=2.0
    )
    assert figure.advantage is not None
    assert figure.advantage.median == pytest.approx(advantage, abs=1e-3)
    assert (figure.target, figure.reached) == ("at least 2 times", reached)


def test_a_ratio_target_needs_someone_to_compare_with() -> None:
    figure = Figure(name="f", unit="s", values={"own": [1.0]}, times_better=2.0)
    assert (figure.advantage, figure.target, figure.reached) == (None, None, None)


@pytest.mark.parametrize(("median", "reached"), [(5.9, True), (6.0, True), (6.1, False)])
def test_a_bound(median: float, reached: bool) -> None:
    figure = Figure(name="f", unit="s", values={"own": [0.0, median, 100.0]}, at_most=6.0)
    assert (figure.target, figure.reached) == ("at most 6 s", reached)
    assert figure.as_json()["contenders"]["own"]["values"] == [0.0, median, 100.0]


def test_the_table_shows_medians_and_verdicts() -> None:
    both = {"own": [10.0, 20.0, 30.0], "other": [10.0, 10.0, 10.0]}
    figures = [
        Figure(name="rate", unit="1/s", values=both, higher_is_better=True, times_better=2),
        Figure(name="own only", unit="", values={"own": [7.0]}),
    ]
    columns, rows = figure_table(figures)
    assert columns[1:] == ["own", "other", "times better", "target"]
    assert rows == [
        ["rate, 1/s", "20 (10 - 30)", "10 (10 - 10)", "2.00", "at least 2 times: reached"],
        ["own only", "7", "", "", ""],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (68.0, "68"), (0.012345, "0.0123"), (9.999, "10.0"), (45.25, "45.2"), (1234.5, "1234")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert shown(value) == text


ROUND = Round(
    num_prompt_tokens=100,
    num_cached_tokens=20,
    num_output_tokens=20,
    num_steps=10,
    seconds=4.0,
    trace=((1.0, 1), (1.5, 3), (2.0, 5), (3.0, 9)),
    first_token_s=(1.0, 1.5),
    first_token_ids=(7, 8),
)


def test_a_round_by_hand() -> None:
    assert ROUND.output_tokens_per_s == 5
    assert ROUND.total_tokens_per_s == 30
    assert ROUND.tokens_per_step == 10
    assert ROUND.ttft_s == 1.25
    assert ROUND.step_gaps_s == [0.5, 1.0], "the step before the last first token is not decoding"
    assert ROUND.decode_tokens_per_s == pytest.approx((9 - 3) / (3.0 - 1.5))


def test_nothing_decoded() -> None:
    only_first = Round(
        num_prompt_tokens=1,
        num_output_tokens=1,
        num_steps=1,
        seconds=1.0,
        trace=((1.0, 1),),
        first_token_s=(1.0,),
        first_token_ids=(1,),
    )
    assert only_first.decode_tokens_per_s is None and only_first.step_gaps_s == []
    assert decode_rates({"a": [only_first]}) == []


def test_agreement_counts_jobs() -> None:
    other = Round(
        num_prompt_tokens=100,
        num_output_tokens=20,
        num_steps=10,
        seconds=4.0,
        trace=ROUND.trace,
        first_token_s=ROUND.first_token_s,
        first_token_ids=(7, 9),
    )
    assert agreement({"a": [ROUND, ROUND], "b": [ROUND, other]}) == 0.75
    assert agreement({"a": [ROUND]}) is None
