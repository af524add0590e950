"""Opening who takes part in a measure: Lockstep alone in this process, or each contender in one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

from lockstep.bench.child import ChildContender, make_contender
from lockstep.bench.contender import Contender
from lockstep.config import Given


@contextmanager
def open_contenders(options: Mapping[str, Given], compare: str | None) -> Iterator[list[Contender]]:
    """Lockstep first, then the one to compare with; closed at the end. Raises LockstepError.

    The other is opened first: Lockstep takes its KV pool from the memory that is free then.
    """
    with ExitStack() as stack:
        if compare is None:
            yield [stack.enter_context(closing(make_contender("lockstep", options)))]
            return
        other = stack.enter_context(closing(ChildContender(compare, options)))
        own = stack.enter_context(closing(ChildContender("lockstep", options)))
        yield [own, other]
