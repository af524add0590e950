"""Keys and values of pages that had to leave the device, in host memory.

Shapes: L, N, P, S, H as in `pool.py`, B pages of a block of host memory, C pages that are copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, groupby
from typing import Any, Protocol

import torch

from lockstep.core.errors import OutOfMemory
from lockstep.core.step import PageCopy
from lockstep.kv.pool.pool import KVPool

PAGES_AT_ONCE = 32
"""Pages that are copied together. Two such sets are staged on the device."""
_BLOCK_BYTES = 256 * 2**20
"""Pinned memory is taken in blocks near this size, because torch rounds what it pins up to a power of two."""


class HostPool:
    """`num_pages` pages of host memory behind a pool, and the copies between them.

    The keys and values of a page lie far apart on the device and together on the host. So copies go through staging
    buffers on the device: between pool and buffer in the order of the device's other work, between buffer and pinned
    host memory on a queue of its own (`new_stream`; None where work runs in the order in which it is submitted). The
    device waits for what is brought back, and for nothing else. Raises OutOfMemory when the host has no room.
    """

    def __init__(
        self, pool: KVPool, *, num_pages: int, new_stream: Callable[[], torch.Stream | None] = lambda: None
    ) -> None:
        self.num_pages = num_pages
        self._page_bytes = pool.total_bytes // pool.num_pages
        self._pages_PLNSH = [stack.permute(2, 0, 1, 3, 4) for stack in pool.stacks]
        self._device = pool.stacks[0].device
        self._stream = new_stream()
        self._pages_of_block = max(1, min(num_pages, _BLOCK_BYTES // self._page_bytes))
        try:
            self._blocks = [self._new_block() for _ in range(-(-num_pages // self._pages_of_block))]
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"the host lacks the {num_pages * self._page_bytes / 2**30:.2f} GiB of --host-cache-size; lower it"
            ) from error
        self._lanes = cycle([self._new_lane(), self._new_lane()])

    @property
    def total_bytes(self) -> int:
        """Host memory of all pages."""
        return len(self._blocks) * self._pages_of_block * self._page_bytes

    @torch.inference_mode()
    def perform(self, copies: Sequence[PageCopy]) -> None:
        """Has the copies under way, as if made one after the other, before whatever is submitted next."""
        for to_host, alike in groupby(copies, key=lambda copy: copy.to_host):
            run = list(alike)
            for first in range(0, len(run), PAGES_AT_ONCE):
                batch = run[first : first + PAGES_AT_ONCE]
                (self._save if to_host else self._load)(batch, next(self._lanes))

    def _save(self, batch: list[PageCopy], lane: _Lane) -> None:
        ids_C = self._page_ids(batch)
        lane.free.wait()
        for pages_PLNSH, staged_CLNSH in zip(self._pages_PLNSH, lane.staged, strict=True):
            torch.index_select(pages_PLNSH, 0, ids_C, out=staged_CLNSH[: len(batch)])
        filled = self._mark()
        with self._aside():
            filled.wait()
            for staged_LNSH, host_LNSH in self._pairs(batch, lane):
                host_LNSH.copy_(staged_LNSH, non_blocking=True)
            lane.free = self._mark()

    def _load(self, batch: list[PageCopy], lane: _Lane) -> None:
        ids_C = self._page_ids(batch)
        with self._aside():
            lane.free.wait()
            for staged_LNSH, host_LNSH in self._pairs(batch, lane):
                staged_LNSH.copy_(host_LNSH, non_blocking=True)
            filled = self._mark()
        filled.wait()
        for pages_PLNSH, staged_CLNSH in zip(self._pages_PLNSH, lane.staged, strict=True):
            pages_PLNSH.index_copy_(0, ids_C, staged_CLNSH[: len(batch)])
        lane.free = self._mark()

    def _pairs(self, batch: list[PageCopy], lane: _Lane) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where each page is staged and where it lies on the host, stack by stack."""
        for at, copy in enumerate(batch):
            block, row = divmod(copy.host_page_id, self._pages_of_block)
            for staged_CLNSH, host_BLNSH in zip(lane.staged, self._blocks[block], strict=True):
                yield staged_CLNSH[at], host_BLNSH[row]

    def _page_ids(self, batch: list[PageCopy]) -> torch.Tensor:
        ids_C = torch.tensor([copy.page_id for copy in batch])
        if self._stream is not None:
            ids_C = ids_C.pin_memory()
        return ids_C.to(self._device, non_blocking=True)

    def _new_block(self) -> list[torch.Tensor]:
        pinned = self._stream is not None
        return [
            torch.empty((self._pages_of_block, *pages.shape[1:]), dtype=pages.dtype, pin_memory=pinned)
            for pages in self._pages_PLNSH
        ]

    def _new_lane(self) -> _Lane:
        shapes = [(PAGES_AT_ONCE, *pages.shape[1:]) for pages in self._pages_PLNSH]
        return _Lane(
            [
                torch.zeros(shape, dtype=pages.dtype, device=self._device)
                for shape, pages in zip(shapes, self._pages_PLNSH, strict=True)
            ]
        )

    def _aside(self) -> AbstractContextManager[Any]:
        """Work submitted inside goes to the queue of its own."""
        return nullcontext() if self._stream is None else self._stream

    def _mark(self) -> _Mark:
        """The place in the current queue after what was submitted so far."""
        if self._stream is None:
            return _Passed()
        event = torch.Event(device=self._device)
        event.record()
        return event


def staging_bytes(page_bytes: int) -> int:
    """Device memory that copies of such pages go through."""
    return 2 * PAGES_AT_ONCE * page_bytes


class _Mark(Protocol):
    def wait(self) -> None:
        """Holds the current queue until the place is passed."""


class _Passed:
    """A place in a queue where nothing ever waits."""

    def wait(self) -> None:
        return


class _Lane:
    """A staging buffer [C, L, N, S, H] for each stack, and when it may be written again."""

    def __init__(self, staged: list[torch.Tensor]) -> None:
        self.staged = staged
        self.free: _Mark = _Passed()
