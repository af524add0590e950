"""Words between pinned memory of the host and an NVIDIA GPU, copied by a kernel in stream order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from lockstep.executor.transfers import Fetched, Transfers
from lockstep.ops.copy_words.programs import copy
from lockstep.platforms.accelerator import StreamEvent

pytestmark = pytest.mark.suite("cuda-1", seconds=20)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 1), (256, 130), (1, 90_001)], ids=str)
def test_both_ways(shape: tuple[int, int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    source = torch.randint(-(2**31), 2**31, shape, generator=g).int().pin_memory()
    wide = torch.full((shape[0], shape[1] + 24), -5, dtype=torch.int32, device="cuda")
    back = torch.zeros(shape, dtype=torch.int32).pin_memory()
    there = wide[:, : shape[1]]
    copy(source, there)
    copy(there, back)
    torch.cuda.synchronize()
    assert torch.equal(back, source) and torch.equal(there.cpu(), source)
    assert bool((wide[:, shape[1] :] == -5).all()), "words beside the target were written"


def test_steps_whose_results_are_read_one_step_late(seed: int) -> None:
    """Staged memory is taken again and outgrown, and a step's kernels read what that step staged."""
    chooser = np.random.default_rng(seed)
    transfers = Transfers(torch.device("cuda"), partial(StreamEvent, torch.cuda, 0), copy)
    rows = torch.zeros(30_000, dtype=torch.int64, device="cuda")
    table = torch.zeros(64, 48, dtype=torch.int32, device="cuda")
    slow = torch.randn(2048, 2048, device="cuda")
    waiting: list[tuple[Fetched, np.ndarray]] = []
    for step in range(60):
        transfers.begin_step()
        count, width = int(chooser.integers(1, 30_000 if step % 9 == 0 else 300)), int(chooser.integers(1, 49))
        given = chooser.integers(0, 2**20, count)
        pages = chooser.integers(0, 2**20, (64, width), dtype=np.int32)
        transfers.fill(rows[:count], given)
        transfers.fill(table[:, :width], pages)
        slow = (slow @ slow).sin()
        packed = torch.stack((rows[:64], table[:, :width].sum(1))).int()
        expected = np.stack((np.resize(given, 64), pages.sum(1)))
        expected[0, min(count, 64) :] = 0
        packed[0, min(count, 64) :] = 0
        waiting.append((transfers.fetch(packed), expected))
        event = transfers.end_step()
        given[:], pages[:] = -1, -1
        if step % 2:
            assert event is not None
            event.synchronize()
            for fetched, wanted in waiting:
                np.testing.assert_array_equal(fetched.read(), wanted)
            waiting.clear()
