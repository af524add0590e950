"""The thread governor, on clocks that the test moves."""

from __future__ import annotations

import itertools

import pytest

from lockstep.executor.threads import FIRST_BACKOFF_S, ThreadGovernor

pytestmark = pytest.mark.suite("cpu")


class Machine:
    """Wall and processor clocks, and the number of threads that was set last."""

    def __init__(self) -> None:
        self.wall_s = 100.0
        self.processor_s = 0.0
        self.threads = 2

    def set_threads(self, num_threads: int) -> None:
        self.threads = num_threads


def step(governor: ThreadGovernor, machine: Machine, *, wall_s: float, busy: float) -> int:
    """One step of `wall_s` in which several threads got the share `busy` of it each, and one all of it."""
    with governor.step() as num_threads:
        machine.wall_s += wall_s
        machine.processor_s += wall_s * (busy * num_threads if num_threads > 1 else 1.0)
    return num_threads


def governed() -> tuple[ThreadGovernor, Machine]:
    machine = Machine()
    governor = ThreadGovernor(
        2, machine.set_threads, wall_s=lambda: machine.wall_s, processor_s=lambda: machine.processor_s
    )
    return governor, machine


def test_undisturbed_steps_keep_their_threads() -> None:
    governor, machine = governed()
    assert [step(governor, machine, wall_s=0.01, busy=0.97) for _ in range(20)] == [2] * 20
    assert machine.threads == 2


def test_a_disturbed_step_is_followed_by_single_threaded_ones_and_a_return() -> None:
    governor, machine = governed()
    assert step(governor, machine, wall_s=0.1, busy=0.5) == 2
    assert step(governor, machine, wall_s=0.01, busy=0.5) == 1
    assert machine.threads == 1
    machine.wall_s += FIRST_BACKOFF_S
    assert step(governor, machine, wall_s=0.01, busy=0.97) == 2
    assert machine.threads == 2


def test_the_pause_doubles_while_the_disturbance_lasts() -> None:
    governor, machine = governed()
    returns_s = []
    for _ in range(4000):
        before_s = machine.wall_s
        if step(governor, machine, wall_s=0.01, busy=0.5) == 2:
            returns_s.append(before_s)
    pauses_s = [late - early for early, late in itertools.pairwise(returns_s)]
    assert pauses_s[0] < pauses_s[1] < pauses_s[2] < pauses_s[3]
    assert len(returns_s) < 12  # 40 s of steps: about 0.25 + 0.5 + 1 + 2 + 4 + 8 + 8 ... s apart


def test_steps_too_short_to_judge_change_nothing() -> None:
    governor, machine = governed()
    assert [step(governor, machine, wall_s=0.001, busy=0.1) for _ in range(5)] == [2] * 5


def test_one_thread_is_left_alone() -> None:
    machine = Machine()
    governor = ThreadGovernor(1, machine.set_threads, wall_s=lambda: machine.wall_s, processor_s=lambda: 0.0)
    with governor.step() as num_threads:
        machine.wall_s += 1.0
    assert (num_threads, machine.threads) == (1, 2)  # 2 is what the machine began with: nothing was set
