"""What torch's accelerator modules (torch.cuda, torch.musa...) have in common: one interface under several names.

Source: PyTorch, "Accelerator integration", the device module that a backend registers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lockstep.core.garbage import nothing_collected
from lockstep.platforms.base import DeviceEvent, DeviceGraph, MemoryFacts, Platform

if TYPE_CHECKING:
    import torch


class TorchAccelerator(Platform, abstract=True):
    """Devices behind a module of torch. Which kernels run on them is each platform's own business."""

    def memory(self, index: int = 0) -> MemoryFacts:
        free_bytes, total_bytes = self._module().mem_get_info(index)
        return MemoryFacts(total_bytes, free_bytes, self._module().memory_reserved(index))

    def release_unused(self, index: int = 0) -> None:
        self._module().empty_cache()

    def device(self, index: int = 0) -> torch.device:
        import torch

        return torch.device(self.device_type, index)

    def synchronize(self) -> None:
        self._module().synchronize()

    @cached_property
    def _is_queued(self) -> bool:
        """Asked once: steps make events, and devices are slow to tell about themselves."""
        return self.capabilities().has_streams

    def new_stream(self, index: int = 0) -> torch.Stream | None:
        import torch

        return torch.Stream(self.device(index)) if self._is_queued else None

    def new_event(self, index: int = 0) -> DeviceEvent | None:
        return StreamEvent(self._module(), index) if self._is_queued else None

    def _has_streams(self) -> bool:
        """True when torch gives a queue of the first device; false where the module knows nothing of queues."""
        current_stream = getattr(self._module(), "current_stream", None)
        return current_stream is not None and current_stream(0) is not None

    def _fast_dtypes(self) -> tuple[str, ...]:
        """bfloat16 where torch says that the device computes in it itself, before float32."""
        supports = getattr(self._module(), "is_bf16_supported", None)
        return ("bfloat16", "float32") if supports is not None and supports() else ("float32",)

    def _module(self) -> Any:
        """torch.cuda, torch.musa...: the module that torch keeps under the device's name."""
        import torch

        return getattr(torch, self.device_type)


class StreamEvent:
    """An event of a device module on whatever stream is current there, whichever device is the current one."""

    def __init__(self, module: Any, index: int) -> None:
        self._module = module
        self._index = index
        self._event = module.Event()

    def record(self) -> None:
        self._event.record(self._module.current_stream(self._index))

    def synchronize(self) -> None:
        self._event.synchronize()


class CudaGraph:
    """A graph of torch.cuda, which is CUDA's or HIP's."""

    def __init__(self, beside: DeviceGraph | None = None) -> None:
        import torch

        self._graph = torch.cuda.CUDAGraph()
        self._where: dict[str, Any] = {"pool": beside._graph.pool()} if isinstance(beside, CudaGraph) else {}

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records what is submitted inside, on a stream of its own, into memory of its own or of its neighbour.

        Results that are kept alive are not written over by the neighbours' work.
        """
        import torch

        # torch.cuda.graph would also collect garbage and empty torch's caches, for each of a step's many pieces.
        # What an engine that is gone gives back while somebody records would spoil the recording.
        torch.cuda.synchronize()
        with nothing_collected(), torch.cuda.stream(_recording_stream(torch.cuda.current_device())):
            self._graph.capture_begin(**self._where)
            try:
                yield
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        """Submits what was recorded to the current stream."""
        self._graph.replay()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, which is not kept from the neighbours' work."""
        import torch

        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.as_tensor(_Bytes(tensor.data_ptr(), (last + 1) * tensor.itemsize), device=tensor.device)
        return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class _Bytes:
    """Device memory that somebody else owns, as NumPy's and CUDA's array interface describes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@cache
def _recording_stream(index: int) -> Any:
    """One for all graphs of a device: memory is taken again by work on the same stream alone."""
    import torch

    return torch.cuda.Stream(index)


def has_package(name: str) -> bool:
    """True when a Python package can be imported; does not import it, though what it lies in."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
