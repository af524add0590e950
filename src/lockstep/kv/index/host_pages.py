"""Pages of host memory behind the device's: who has them, and which copies the next step begins with."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.core.errors import IntegrityError
from lockstep.core.step import PageCopy
from lockstep.kv.index.allocator import PageAllocator


class HostPages:
    """Hands out pages 0..num_pages-1 of the host, and writes down what is to be copied, in order.

    A page may be copied from, freed and copied to again before the copies are taken: whoever makes them does so in
    order. `num_loaded` counts the pages that came back.
    """

    def __init__(self, num_pages: int) -> None:
        self._allocator = PageAllocator(num_pages)
        self._copies: list[PageCopy] = []
        self.num_loaded = 0

    @property
    def num_total(self) -> int:
        return self._allocator.num_pages

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    def save(self, page_ids: Sequence[int]) -> tuple[int, ...]:
        """Pages of the host that get what these pages of the device hold. Raises IntegrityError without room."""
        taken = self._allocator.take(len(page_ids))
        self._copies += [
            PageCopy(page_id, host_id, True) for page_id, host_id in zip(page_ids, taken, strict=True)
        ]
        return tuple(taken)

    def load(self, host_ids: Sequence[int], page_ids: Sequence[int]) -> None:
        """Brings pages back to these pages of the device; those of the host are free."""
        self._copies += [
            PageCopy(page_id, host_id, False) for page_id, host_id in zip(page_ids, host_ids, strict=True)
        ]
        self.num_loaded += len(host_ids)
        self.forget(host_ids)

    def forget(self, host_ids: Sequence[int]) -> None:
        """The pages are free."""
        self._allocator.give_back(host_ids)

    def take_copies(self) -> tuple[PageCopy, ...]:
        """What is to be copied before the next step, in this order. Given once."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def check(self, page_ids: list[int]) -> None:
        """Raises IntegrityError unless each page is free or, once, among `page_ids`."""
        if sorted(self._allocator.check() + page_ids) != list(range(self.num_total)):
            raise IntegrityError("a page of the host has no owner, or several")
