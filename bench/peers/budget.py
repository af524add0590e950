"""How many rounds fit into the time there is."""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.core.clock import Clock


def rounds_within(budget_s: float, most: int, clock: Clock) -> Iterator[int]:
    """Round numbers from 0: the first always, a further one only if the longest so far would still end in time."""
    start_s = clock.now_s()
    longest_s = 0.0
    for number in range(most):
        begin_s = clock.now_s()
        if number and begin_s + longest_s > start_s + budget_s:
            return
        yield number
        longest_s = max(longest_s, clock.now_s() - begin_s)
