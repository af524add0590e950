"""Python's collector of reference cycles while an engine starts."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def start_without_collecting() -> Iterator[None]:
    """For a process that is an engine: what is imported and built inside is there to stay.

    The collector would walk through all of it again and again, a seventh of the time to a first token. It starts at
    the end, and leaves alone what was made until then, but for the interpreter's own end.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Objects that native code holds are reported as leaks when a process ends with them frozen.
        atexit.register(gc.unfreeze)
        if was_on:
            gc.enable()
