"""Whether there is room for one more running sequence."""

from __future__ import annotations

from lockstep.core.step import SequenceStart
from lockstep.kv.index.page_index import PageIndex
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.sequence import Sequence

GROWTH_TOKENS = 16
"""Room that admission leaves for each running sequence, so that the newcomer is not preempted at once."""


class Admission:
    """Gives a sequence the pages of all its known tokens, or none.

    Since a running sequence always has pages for what it knows, only generated tokens can run out of pages, and
    two half-computed prompts cannot block each other.
    """

    def __init__(self, limits: SchedulerLimits, pages: PageIndex) -> None:
        self._limits = limits
        self._pages = pages

    def admit(self, sequence: Sequence, num_running: int) -> tuple[SequenceStart, tuple[int, ...]] | None:
        """What the executor needs to start the sequence: its start, with the cached pages, and its new pages.

        None when there is no room; then nothing changed, but its cached prefix may count as just used.
        """
        if sequence.num_awaited:
            return None  # preempted while a step in flight finds its next token
        limits, pages = self._limits, self._pages
        num_reserved = num_running * limits.num_pages_for(GROWTH_TOKENS)
        if num_running >= limits.max_running_sequences or pages.num_pages_available <= num_reserved:
            return None
        table = pages.begin(sequence.token_ids, use_cache=sequence.may_read_cache)
        num_known = len(sequence.token_ids)
        num_new = limits.num_pages_for(num_known) - len(table.page_ids)
        if num_new > pages.num_pages_available - num_reserved:
            pages.release(table)
            return None
        start = sequence.enter(table)
        new_page_ids = pages.grow(table, num_known)
        assert new_page_ids is not None
        return start, new_page_ids
