"""Copies between host and device that nobody waits for until their values are wanted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lockstep.platforms.base import DeviceEvent

NewEvent = Callable[[], DeviceEvent | None]
_ALIGNED_BYTES = 64


class Transfers:
    """The host memory that a device copies from and to, step by step.

    What a device copies from must stay as it is until the copy has run. So arrays are staged in pinned memory that is
    taken again two steps later, after that step's event; a step that comes sooner waits. Where `new_event` gives
    None, work has run when its submission returns, and nothing is pinned or waited for.
    """

    def __init__(self, device: torch.device, new_event: NewEvent = lambda: None) -> None:
        self.device = device
        self._new_event = new_event
        self._is_immediate = new_event() is None
        self._rooms = (_Room(), _Room())
        self._turn = 0

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

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device, in stream order."""
        return self.stage(array).to(self.device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor with these values, of this moment in the stream, once the step's event has passed."""
        if self._is_immediate:
            return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        # torch's own allocator keeps pinned memory that is let go until the copy into it has run.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Room:
    """Pinned memory for the arrays of one step."""

    def __init__(self) -> None:
        self.event: DeviceEvent | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._outgrown: list[torch.Tensor] = []
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
            self._memory = torch.empty(2 * end, dtype=torch.uint8, pin_memory=True)
        source = torch.from_numpy(array)
        staged = self._memory[self._num_used : end].view(source.dtype).view(source.shape)
        staged.copy_(source)
        self._num_used = -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return staged
