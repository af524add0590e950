"""Python's collector of reference cycles in a process that is an engine, or has one."""

from __future__ import annotations

import atexit
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""A step of 256 requests makes a thousand objects, all let go of without the collector. By Python's own 700 it would
walk through those of the step in hand at every step, a tenth of the host's time."""


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For what must not be disturbed by the end of something else: reference cycles wait until it is done."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def start_without_collecting() -> Iterator[None]:
    """For a process that is an engine: what is imported and built inside is there to stay.

    The collector would walk through all of it again and again, a seventh of the time to a first token. It starts at
    the end, for more objects at a time than Python has it, and leaves alone what was made until then, but for the
    interpreter's own end.
    """
    with nothing_collected():
        try:
            yield
        finally:
            gc.freeze()
            gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
            # Objects that native code holds are reported as leaks when a process ends with them frozen.
            atexit.register(gc.unfreeze)


def leave_alone_while(owner: object) -> weakref.finalize[..., object]:
    """For an engine in somebody else's process: collections leave alone what there is now, until the owner is gone.

    To walk through all that PyTorch and Triton keep would stop a step for a tenth of a second, every few seconds. Call
    what is returned to have that end earlier. Nothing else about the process's collector changes.
    """
    gc.freeze()
    return weakref.finalize(owner, gc.unfreeze)
