"""How long one call of an operator takes, on whatever clock the device has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.bench.figures import Spread
from lockstep.platforms.base import Platform

Call = Callable[[], Any]

_DEVICE_BYTES, _HOST_BYTES = 2**30, 2**27
"""Memory that calls walk through before one meets its arguments again, well above any cache's size."""
_MOST_CALLS = 128
_PASS_S = 0.5
_REPEATS_S = 0.3
_REPEATS = (3, 30)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call over the repeats; `method` says how `num_calls` calls were timed together."""

    seconds: Spread
    num_calls: int
    num_repeats: int
    method: str


def time_calls(
    platform: Platform,
    new_call: Callable[[], Call],
    num_bytes: int,
    *,
    repeats_s: float = _REPEATS_S,
    asks_host: bool = False,
) -> Timing:
    """The time of a call, each on arguments of its own so that caches do not serve it.

    `new_call` makes a call with fresh arguments; a call moves `num_bytes`. Calls are repeated for about `repeats_s`.
    Calls that move less than 1/128 of what a cache holds do stay in it. The method is the best that the device has: one
    graph of all calls between two events of the device, the calls one after the other between two events, or the
    host's clock. A call that a graph cannot hold is timed one after the other; of one that `asks_host` that is known.
    """
    first = new_call()
    first()
    seconds_once = _elapsed(platform, first)
    capabilities = platform.capabilities()
    cold_bytes = _DEVICE_BYTES if capabilities.has_streams else _HOST_BYTES
    wanted = min(max(cold_bytes // max(num_bytes, 1), 2), _MOST_CALLS)
    calls = [first, *(new_call() for _ in range(min(wanted, int(_PASS_S / seconds_once) + 1) - 1))]
    submit, how = _submission(platform, calls, asks_host)
    clock = _between_events if capabilities.has_streams else _elapsed
    clock(platform, submit)
    pass_s = clock(platform, submit)
    fewest, most = _REPEATS
    repeats = min(max(int(repeats_s / pass_s), fewest), most)
    seconds = [clock(platform, submit) / len(calls) for _ in range(repeats)]
    clock_name = "device events" if capabilities.has_streams else "host clock"
    return Timing(Spread.of(seconds), len(calls), repeats, f"{how}, {clock_name}")


def _submission(platform: Platform, calls: list[Call], asks_host: bool) -> tuple[Call, str]:
    """What submits all calls, and in words how."""
    if platform.capabilities().has_graphs and not asks_host:
        graph = platform.new_graph()
        try:
            with graph.capture():
                # All alive at once, so that no result is written where another still lies in a cache.
                results = [call() for call in calls]
            del results
        except RuntimeError:
            # A call that waits for the device, or that makes a stream of its own, is none for a graph.
            platform.synchronize()
        else:
            return graph.replay, "one graph"
    return lambda: [call() for call in calls], "one after the other"


def _between_events(platform: Platform, submit: Call) -> float:
    """Seconds on the device's own clock."""
    device = platform.device()
    begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    begin.record()
    submit()
    end.record()
    platform.synchronize()
    return begin.elapsed_time(end) / 1e3


def _elapsed(platform: Platform, submit: Call) -> float:
    """Seconds on the host's clock, until the device is done."""
    begin_s = time.perf_counter()
    submit()
    platform.synchronize()
    return time.perf_counter() - begin_s
