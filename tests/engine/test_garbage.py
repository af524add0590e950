"""The collector of cycles rests while an engine starts, and is as it was after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lockstep.core.garbage import start_without_collecting

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_it_rests_inside_and_is_as_before_after(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with start_without_collecting():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled() == was_on
    assert gc.get_freeze_count() >= len(made), "what was made is left alone"


def test_a_start_that_fails_turns_it_on_again() -> None:
    gc.enable()
    with pytest.raises(ValueError), start_without_collecting():
        raise ValueError
    assert gc.isenabled()
