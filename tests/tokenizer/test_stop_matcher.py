"""Stop strings end the text at the same place however it is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.tokenizer.stops import StopMatcher

pytestmark = pytest.mark.suite("cpu")

LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def stopped(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Reads letter by letter until the text ends with a stop string; the longest of several wins."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include_stop else end - len(stop)], stop
    return text, None


@settings(max_examples=1000, deadline=None)
@given(LETTERS, STOPS, st.booleans(), st.lists(st.integers(0, 30), max_size=6))
def test_equals_reading_letter_by_letter(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    matcher = StopMatcher(stops, include)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    released, matched = "", None
    for start, end in itertools.pairwise(edges):
        piece, matched = matcher.push(text[start:end])
        released += piece
        expected, _ = stopped(text[:end], stops, include)
        assert expected.startswith(released), "released what belongs to a stop string"
    if matched is None:
        released += matcher.finish()
    assert (released, matched) == stopped(text, stops, include)


def test_holds_back_no_more_than_needed() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go ST") == ("go ", None)
    assert matcher.push("ART S") == ("START ", None)
    assert matcher.push("TOP more") == ("", "STOP")
    assert matcher.push("more") == ("", "STOP")
    assert matcher.finish() == ""


@pytest.mark.parametrize("text", ["", "anything"])
def test_without_stop_strings_everything_passes(text: str) -> None:
    matcher = StopMatcher(())
    assert matcher.push(text) == (text, None)
    assert matcher.finish() == ""
