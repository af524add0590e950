"""The extension's threads: one pool for a process."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from lockstep.native.loader import extension


@cache
def thread_pool() -> Any:
    """The extension's Pool over the cores that this process may use. Needs the extension."""
    native = extension()
    assert native is not None
    return native.Pool(_cores())


def _cores() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return list(range(os.cpu_count() or 1))
