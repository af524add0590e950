"""Copies that run later than they are submitted: what may be written when, and what may be read when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from taped_engine import MOST_ROWS, PARAMS, Engine, decode_plan, layout_named, plans

from lockstep.core.sampling import SamplingParams
from lockstep.core.step import Pending
from lockstep.executor.runner import ModelRunner
from lockstep.executor.transfers import Fetched, Transfers

pytestmark = pytest.mark.suite("cpu", seconds=20)

HOST = torch.device("cpu")


class Queue:
    """A device that runs its copies when an event after them is waited for, and not before."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.num_run = 0

    def event(self) -> Event:
        return Event(self)

    def run(self, count: int) -> None:
        for copy in self.waiting[self.num_run : count]:
            copy()
        self.num_run = max(self.num_run, count)


class Event:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._place = -1

    def record(self) -> None:
        self._place = len(self._queue.waiting)

    def synchronize(self) -> None:
        assert self._place >= 0, "waited for an event that was not recorded"
        self._queue.run(self._place)


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only a device's driver pins memory: here plain memory takes its place."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **kinds: empty(*sizes, **kinds))
    yield


class LateTransfers(Transfers):
    """Downloads hold nonsense until their step's event has passed."""

    def __init__(self) -> None:
        self.queue = Queue()
        super().__init__(HOST, self.queue.event)

    def _land(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.numpy().copy()
        host.fill_(-77)
        self.queue.waiting.append(lambda: np.copyto(host.numpy(), kept))
        return host

    _land_words = _land


def place(fetched: Fetched) -> int:
    assert fetched._host is not None
    return fetched._host.data_ptr()


def late_runner(engine: Engine) -> ModelRunner:
    """The engine's model behind transfers that are late."""
    return ModelRunner(
        engine.model,
        engine.pool,
        engine.attention,
        max_sequences=MOST_ROWS + 1,
        windows=engine.build.windows,
        eos_token_ids=(),
        transfers=LateTransfers(),
        graphs=engine.recorded,
    )


@pytest.mark.parametrize("params", [PARAMS, replace(PARAMS, logprobs=None)], ids=["scored", "bare"])
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_results_that_are_taken_late_are_the_same(unpinned: None, ahead: int, params: SamplingParams) -> None:
    """The host never says what was sampled, and reads it after the next step was submitted."""
    layout = layout_named("llama")
    script = plans({0: 3, 1: 9, 2: 1, 3: 4}, [2, 0], 9, params)
    prompt_alone = Engine(layout).runner
    expected = [prompt_alone.execute(plan) for plan in script]
    runner, pending, found = late_runner(Engine(layout, with_graphs=True)), list[Pending](), []
    for plan in script:
        pending.append(runner.submit(plan))
        if len(pending) > ahead:
            found.append(pending.pop(0).result())
    found += [step.result() for step in pending]
    for one, other in zip(found, expected, strict=True):
        assert one.step_id == other.step_id
        for mine, twin in zip(one.sequences, other.sequences, strict=True):
            assert (mine.seq_id, mine.token_ids, mine.error) == (twin.seq_id, twin.token_ids, None)
            assert len(mine.logprobs) == (params.logprobs is not None)
            for my_logprob, its_logprob in zip(mine.logprobs, twin.logprobs, strict=True):
                assert my_logprob.logprob == pytest.approx(its_logprob.logprob, abs=1e-5)
                assert [each for each, _ in my_logprob.top] == [each for each, _ in its_logprob.top]


def test_the_double_notices_who_reads_too_early(unpinned: None) -> None:
    runner = late_runner(Engine(layout_named("llama"), with_graphs=True))
    step: Any = runner.submit(plans({0: 3}, [], 0)[0])
    assert (step.findings.chosen._host == -77).all()
    assert step.result().sequences[0].token_ids[0] >= 0
    assert runner.submit(decode_plan(1, {0: 3})).result().sequences[0].error is None


def test_staged_arrays_stay_until_their_step_has_run(unpinned: None) -> None:
    """Two steps have their own memory; the third takes the first one's again, and waits for it."""
    transfers = LateTransfers()
    arrays = [
        np.arange(count, dtype=dtype) for count, dtype in ((5, np.int64), (700, np.int32), (3, np.float32))
    ]
    staged: list[list[torch.Tensor]] = []
    for _ in range(2):
        transfers.begin_step()
        staged.append([transfers.stage(array) for array in arrays])
        transfers.download(staged[-1][0])
        transfers.end_step()
    memory = {tensor.data_ptr() for step in staged for tensor in step}
    assert len(memory) == 6 and transfers.queue.num_run == 0
    for step in staged:
        for tensor, array in zip(step, arrays, strict=True):
            assert tensor.dtype == torch.from_numpy(array).dtype and tensor.tolist() == array.tolist()
    transfers.begin_step()
    assert transfers.queue.num_run == 1, "the first step, and not the second, was waited for"
    again = [transfers.stage(array).data_ptr() for array in arrays]
    assert set(again) < memory or len(set(again)) == 3
    assert all(tensor.tolist() == array.tolist() for tensor, array in zip(staged[1], arrays, strict=True))


def test_memory_grows_and_what_was_staged_before_is_kept(unpinned: None) -> None:
    transfers = LateTransfers()
    transfers.begin_step()
    small = transfers.stage(np.arange(4))
    large = transfers.stage(np.arange(100_000))
    assert small.tolist() == [0, 1, 2, 3] and large[-1] == 99_999
    assert transfers.stage(np.zeros((0, 3), dtype=np.int32)).shape == (0, 3)


def test_memory_of_results_is_used_again_once_they_were_read(unpinned: None) -> None:
    """However many are under way, none is written over."""
    transfers, tensors = LateTransfers(), [torch.arange(6).view(2, 3).int() + 10 * at for at in range(5)]
    first, second, third = (transfers.fetch(tensor) for tensor in tensors[:3])
    memory = {place(each) for each in (first, second, third)}
    assert len(memory) == 3
    transfers.queue.run(3)
    read = [second.read()]
    fourth, fifth, wide = (transfers.fetch(tensor) for tensor in (*tensors[3:], torch.ones(2, 500)))
    assert place(fourth) in memory and not {place(fifth), place(wide)} & memory
    read += [each.read() for each in (first, third)]
    transfers.queue.run(6)
    read += [fifth.read(), fourth.read()]
    assert [found.tolist() for found in read] == [tensors[at].tolist() for at in (1, 0, 2, 4, 3)]
    assert wide.read().sum() == 1000
    with pytest.raises(AssertionError, match="written over"):
        wide.read()


def test_where_work_runs_at_once_nothing_is_pinned_or_waited_for() -> None:
    transfers = Transfers(HOST)
    transfers.begin_step()
    array = np.arange(6).reshape(2, 3)
    assert transfers.stage(array).data_ptr() == array.ctypes.data
    tensor = torch.ones(3)
    copy = transfers.download(tensor)
    tensor.zero_()
    assert copy.tolist() == [1, 1, 1] and transfers.end_step() is None
