"""What repeated measurements say: medians, spreads, percentiles, and whether a target is reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, linear between neighbours (as numpy's default method).

    Raises ValueError when there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises statistics.StatisticsError when there are no values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity: contender -> one value per round, in the rounds' order.

    Two targets are known: `at_most` bounds the median of the first contender; `times_better` bounds how many times
    better it is than the second.
    """

    name: str
    unit: str
    values: Mapping[str, Sequence[float]]
    higher_is_better: bool = False
    at_most: float | None = None
    times_better: float | None = None

    @property
    def advantage(self) -> Spread | None:
        """How many times better the first contender is than the second, round by round; None without a second."""
        if len(self.values) < 2:
            return None
        first, second = list(self.values.values())[:2]
        pairs = zip(first, second, strict=True)
        return Spread.of([a / b if self.higher_is_better else b / a for a, b in pairs])

    @property
    def target(self) -> str | None:
        """The target in words; None when there is none that these contenders can show."""
        if self.at_most is not None:
            return f"at most {self.at_most:g} {self.unit}".rstrip()
        if self.times_better is not None and self.advantage is not None:
            return f"at least {self.times_better:g} times"
        return None

    @property
    def reached(self) -> bool | None:
        """Whether the median meets the target; None without a target."""
        if self.at_most is not None:
            return Spread.of(next(iter(self.values.values()))).median <= self.at_most
        if self.times_better is not None and self.advantage is not None:
            return self.advantage.median >= self.times_better
        return None

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "name": self.name,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "contenders": {name: summary(values) for name, values in self.values.items()},
            "advantage": _range(self.advantage),
            "target": self.target,
            "reached": self.reached,
        }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and the values themselves."""
    return {**(_range(Spread.of(values)) or {}), "values": list(values)}


def _range(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else {"median": spread.median, "min": spread.min, "max": spread.max}
