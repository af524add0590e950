"""The free list."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.core.errors import IntegrityError


class PageAllocator:
    """Hands out page ids 0..num_pages-1: at first in ascending order, then the latest given back first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, now the caller's. Raises IntegrityError when fewer are free: callers ask first."""
        if count > len(self._free):
            raise IntegrityError(f"{count} pages were taken while {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page_id in taken:
            self._is_free[page_id] = 0
        return taken

    def give_back(self, page_ids: Sequence[int]) -> None:
        """The pages are free again. Raises IntegrityError for a page that is already free or does not exist."""
        for page_id in page_ids:
            if not 0 <= page_id < self.num_pages or self._is_free[page_id]:
                raise IntegrityError(f"page {page_id} of {self.num_pages} was freed while not in use")
            self._is_free[page_id] = 1
            self._free.append(page_id)

    def check(self) -> list[int]:
        """The free page ids. Raises IntegrityError when the list and the marks disagree."""
        if len(set(self._free)) != len(self._free):
            raise IntegrityError("the free list holds a page twice")
        if sorted(self._free) != [page_id for page_id, free in enumerate(self._is_free) if free]:
            raise IntegrityError("the free list and the free marks disagree")
        return list(self._free)
