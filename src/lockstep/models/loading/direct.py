"""Weights from files straight to a device: several threads read large blocks into memory that the device copies from.

A copy from a mapped file goes through one more buffer and waits for each page. Here every thread has a queue of the
device and two pinned blocks: while one is copied to the device, the other is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lockstep.core.errors import ModelFileError
from lockstep.formats.model_files import TensorInfo
from lockstep.formats.storage import unreadable
from lockstep.models.loading.weights import Rectangle, matrix_shape, storage_type_of

NUM_THREADS = 8
BLOCK_BYTES = 8 * 2**20


class Reading(NamedTuple):
    """A part of a stored tensor, and the contiguous tensor that it is read into, converted where the dtypes differ."""

    target: torch.Tensor
    info: TensorInfo
    part: Rectangle


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring bytes of a file, and where their values belong.

    They are read as rows of `row_size` values of `dtype`, of which columns `first` to `last` are wanted.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    row_size: int
    first: int
    last: int
    target: torch.Tensor


class DirectReader:
    """Reads parts of plain tensors into memory of `device`. `close` ends its threads and closes its files.

    `new_stream` makes one more queue of the device; None where work runs in the order it is submitted in.
    """

    def __init__(
        self,
        device: torch.device,
        new_stream: Callable[[], torch.Stream | None] | None,
        *,
        num_threads: int = NUM_THREADS,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.device = device
        self._new_stream = new_stream
        self._block_bytes = block_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._own = threading.local()
        self._files: dict[Path, int] = {}

    def serves(self, info: TensorInfo) -> bool:
        """True for plain values in Hugging Face's order, whose rows fit into a block."""
        if info.stored_offset or info.interleaved_head_dim:
            return False
        storage = storage_type_of(info)
        return storage.dtype is not None and storage.row_bytes(matrix_shape(info.shape)[1]) <= self._block_bytes

    def read(self, readings: Sequence[Reading]) -> None:
        """Fills every target: what is submitted to the device afterwards sees the values.

        Raises ModelFileError for a file that cannot be read or has become shorter.
        """
        blocks = [block for reading in readings for block in self._blocks(reading)]
        before = self._mark()
        for block in blocks:
            self._descriptor(block.file)
        for copied in list(self._threads.map(lambda block: self._move(block, before), blocks)):
            if copied is not None:
                copied.wait()

    def close(self) -> None:
        """May be called twice."""
        self._threads.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _mark(self) -> torch.Event | None:
        """The point that the device's current queue has reached: a target's memory may still be read before it."""
        if self._new_stream is None:
            return None
        event = torch.Event(device=self.device)
        event.record()
        return event

    def _blocks(self, reading: Reading) -> Iterator[_Block]:
        target, info, part = reading
        storage = storage_type_of(info)
        assert storage.dtype is not None and target.is_contiguous()
        _, num_columns = matrix_shape(info.shape)
        row_bytes = storage.row_bytes(num_columns)
        if row_bytes == 0 or target.numel() == 0:
            return
        rows_RC = target.view(part.last_row - part.first_row, part.last_column - part.first_column)
        rows_of_block = self._block_bytes // row_bytes
        for first in range(part.first_row, part.last_row, rows_of_block):
            last = min(first + rows_of_block, part.last_row)
            yield _Block(
                info.file,
                info.offset + first * row_bytes,
                (last - first) * row_bytes,
                storage.dtype,
                num_columns,
                part.first_column,
                part.last_column,
                rows_RC[first - part.first_row : last - part.first_row],
            )

    def _move(self, block: _Block, before: torch.Event | None) -> torch.Event | None:
        """Reads a block and submits its copy; the event of the copy's end."""
        lane = self._lane()
        buffer = lane.next_buffer()
        self._read(block, buffer[: block.nbytes])
        values_RC = buffer[: block.nbytes].view(block.dtype).view(-1, block.row_size)
        # Targets made in inference mode may be written in it alone, and threads do not inherit it.
        with torch.inference_mode(), lane.submitting(before):
            if block.last - block.first < block.row_size or block.dtype != block.target.dtype:
                values_RC = values_RC.to(self.device, non_blocking=True)[:, block.first : block.last]
            block.target.copy_(values_RC, non_blocking=True)
            return lane.copied()

    def _lane(self) -> _Lane:
        if not hasattr(self._own, "lane"):
            stream = self._new_stream() if self._new_stream is not None else None
            self._own.lane = _Lane(stream, self._block_bytes)
        lane: _Lane = self._own.lane
        return lane

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise unreadable(file, error) from error
        return self._files[file]

    def _read(self, block: _Block, buffer: torch.Tensor) -> None:
        view, done = memoryview(buffer.numpy().data), 0
        while done < block.nbytes:
            try:
                count = os.preadv(self._files[block.file], [view[done:]], block.offset + done)
            except OSError as error:
                raise unreadable(block.file, error) from error
            if count == 0:
                raise ModelFileError(f"{block.file}: ended at byte {block.offset + done} while it was read")
            done += count


class _Lane:
    """What one thread reads and copies with: two buffers in turn, and a queue of the device."""

    def __init__(self, stream: torch.Stream | None, block_bytes: int) -> None:
        self._stream = stream
        # Memory is pinned for the current device, which in a new thread is the first one.
        with stream if stream is not None else nullcontext():
            self._buffers = [
                torch.empty(block_bytes, dtype=torch.uint8, pin_memory=stream is not None) for _ in range(2)
            ]
        self._copied: list[torch.Event | None] = [None, None]
        self._at = 0

    def next_buffer(self) -> torch.Tensor:
        """The buffer whose turn it is, once the device has copied what was in it."""
        self._at = 1 - self._at
        copied = self._copied[self._at]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._at]

    def submitting(self, before: torch.Event | None) -> AbstractContextManager[Any]:
        """Inside, work goes to this lane's queue, after what was submitted up to `before`."""
        if self._stream is None:
            return nullcontext()
        if before is not None:
            self._stream.wait_event(before)
        return self._stream

    def copied(self) -> torch.Event | None:
        """The end of what was submitted from the current buffer."""
        if self._stream is not None:
            self._copied[self._at] = self._stream.record_event()
        return self._copied[self._at]
