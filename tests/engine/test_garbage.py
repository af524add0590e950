"""The collector of cycles rests while an engine starts, and is as it was after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from lockstep.core.garbage import OBJECTS_BETWEEN_COLLECTIONS, start_without_collecting
from lockstep.engine.llm import LLM
from lockstep.platforms import accelerator

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_on, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_it_rests_inside_and_is_as_before_after(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with start_without_collecting():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled() == was_on
    assert gc.get_freeze_count() >= len(made), "what was made is left alone"


def test_steps_do_not_set_it_off() -> None:
    gc.enable()
    with start_without_collecting():
        pass
    num_before = [generation["collections"] for generation in gc.get_stats()]
    held = [[number] for number in range(OBJECTS_BETWEEN_COLLECTIONS // 2)]
    assert [generation["collections"] for generation in gc.get_stats()] == num_before
    held += [[number] for number in range(OBJECTS_BETWEEN_COLLECTIONS)]
    assert sum(generation["collections"] for generation in gc.get_stats()) > sum(num_before), "but many do"


def test_a_start_that_fails_turns_it_on_again() -> None:
    gc.enable()
    with pytest.raises(ValueError), start_without_collecting():
        raise ValueError
    assert gc.isenabled()


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_it_rests_while_a_graph_is_recorded(fails: bool, was_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is collected there would give memory back, which spoils the recording."""
    for name in ("synchronize", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(accelerator, "_recording_stream", lambda index: None)
    graph = object.__new__(accelerator.CudaGraph)
    graph._graph, graph._where = Mock(), {}
    (gc.enable if was_on else gc.disable)()
    with pytest.raises(ValueError) if fails else nullcontext(), graph.capture():
        assert not gc.isenabled()
        if fails:
            raise ValueError
    assert gc.isenabled() == was_on
    assert [call[0] for call in graph._graph.mock_calls] == ["capture_begin", "capture_end"]


@pytest.mark.parametrize("closed", [True, False])
def test_what_an_llm_found_is_left_alone_until_it_is_closed_or_gone(closed: bool) -> None:
    gc.unfreeze()
    llm = LLM(max_total_tokens=256, context_length=128)
    assert gc.get_freeze_count() > 50_000, "the model and all that was imported for it"
    if closed:
        llm.close()
    else:
        del llm
    assert gc.get_freeze_count() == 0
