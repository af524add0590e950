"""Copies between host and device that nobody waits for until their values are wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lockstep.ops.copy_words.reference import copy_words
from lockstep.platforms.base import DeviceEvent

NewEvent = Callable[[], DeviceEvent | None]
CopyWords = Callable[[torch.Tensor, torch.Tensor], None]
"""A kernel of copy_words."""

_ALIGNED_BYTES = 64


class Transfers:
    """The host memory that a device copies from and to, step by step.

    What a device copies from must stay as it is until the copy has run. So arrays are staged in pinned memory that is
    taken again two steps later, after that step's event; a step that comes sooner waits. Where `new_event` gives
    None, work has run when its submission returns, and nothing is pinned or waited for. What every step copies goes by
    `copy`: a device begins a kernel sooner than a copy.
    """

    def __init__(
        self, device: torch.device, new_event: NewEvent = lambda: None, copy: CopyWords = copy_words
    ) -> None:
        self.device = device
        self._copy = copy
        self._new_event = new_event
        self._is_immediate = new_event() is None
        self._rooms = (_Room(), _Room())
        self._turn = 0
        self._landings = defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]](list)

    def begin_step(self) -> None:
        """Everything staged from now on belongs to a new step."""
        self._turn = 1 - self._turn
        self._rooms[self._turn].clear()

    def end_step(self) -> DeviceEvent | None:
        """The event after everything that the step submitted; None when it has run."""
        event = self._new_event()
        if event is not None:
            event.record()
            self._rooms[self._turn].event = event
        return event

    def stage(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor that the device may copy from until the step has run. Do not write to either."""
        return torch.from_numpy(array) if self._is_immediate else self._rooms[self._turn].put(array)

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        """Copies the array to memory of the device that has its shape and its dtype, in stream order."""
        self._copy(_as_words(self.stage(array)), _as_words(target))

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device, in stream order."""
        return self.stage(array).to(self.device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor with these values, of this moment in the stream, once the step's event has passed.

        For what few steps want: the memory is new.
        """
        # torch's own allocator keeps pinned memory that is let go until the copy into it has run.
        return self._land(self._new_memory(tensor.shape, tensor.dtype), tensor)

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        """The same for what every step has, packed int32, into memory that is used again once it was read."""
        landings = self._landings[tensor.shape, tensor.dtype]
        host = landings.pop() if landings else self._new_memory(tensor.shape, tensor.dtype)
        return Fetched(self._land_words(host, tensor), landings)

    def _new_memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=not self._is_immediate)

    def _land(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Has the host tensor filled with these values."""
        return host.copy_(tensor, non_blocking=not self._is_immediate)

    def _land_words(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The same for values of 32 bits."""
        self._copy(_as_words(tensor), _as_words(host))
        return host


def _as_words(values: torch.Tensor) -> torch.Tensor:
    """The same memory as rows of 32 bits: what lies apart in it are the rows of a matrix, if anything."""
    rows = values if values.dim() == 2 else values.view(1, -1)
    return rows.view(torch.int32)


class Fetched:
    """Values on their way to the host, there once the step's event has passed."""

    def __init__(self, host: torch.Tensor, landings: list[torch.Tensor]) -> None:
        self._host: torch.Tensor | None = host
        self._landings = landings

    def read(self) -> np.ndarray:
        """The values. Called once: others take the memory after that."""
        host, self._host = self._host, None
        assert host is not None, "what was read may have been written over"
        values = host.numpy().copy()
        self._landings.append(host)
        return values


class _Room:
    """Pinned memory for the arrays of one step."""

    def __init__(self) -> None:
        self.event: DeviceEvent | None = None
        self._memory = np.empty(0, dtype=np.uint8)
        self._outgrown: list[np.ndarray] = []
        self._num_used = 0

    def clear(self) -> None:
        """Waits until the step that used it has run."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        self._outgrown.clear()
        self._num_used = 0

    def put(self, array: np.ndarray) -> torch.Tensor:
        end = self._num_used + array.nbytes
        if end > len(self._memory):
            self._outgrown.append(self._memory)
            # Seen through numpy, which takes less time for the few steps that it takes to fill it.
            self._memory = torch.empty(2 * end, dtype=torch.uint8, pin_memory=True).numpy()
        staged = self._memory[self._num_used : end].view(array.dtype).reshape(array.shape)
        staged[...] = array
        self._num_used = -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return torch.from_numpy(staged)
