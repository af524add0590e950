"""What every platform must say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import LockstepError

if TYPE_CHECKING:
    import torch


class PlatformError(LockstepError):
    """A platform is not fit for use as it is written, or was asked for something that its device cannot do."""


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory of one device, in bytes. `available_bytes` is what this process may still take, `held_bytes` what it has,
    0 where nobody knows."""

    total_bytes: int
    available_bytes: int
    held_bytes: int = 0


@dataclass(slots=True)
class MemoryUse:
    """The most memory, in bytes, that something took beyond what was there before. Known once it has ended."""

    bytes: int = 0


class DeviceGraph(Protocol):
    """Work that is recorded once and submitted again as a whole, over the same memory."""

    def capture(self) -> AbstractContextManager[Any]:
        """Records what is submitted inside instead of running it."""
        ...

    def replay(self) -> None:
        """Submits what was recorded."""
        ...

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the tensor lies in the graph's memory, which graphs that are recorded later may write over.

        So its values are there from the replay that writes them to the next one that needs the memory.
        """
        ...


class DeviceEvent(Protocol):
    """A place in the queue of a device."""

    def record(self) -> None:
        """The place after everything submitted so far."""
        ...

    def synchronize(self) -> None:
        """Returns when the device has passed it. Raises what went wrong on the way."""
        ...


class Platform(ABC):
    """A family of devices. Subclasses state facts; nothing here guesses, and what is not stated is "no".

    `device_type` is torch's word for the device. `kernel_preference` orders kernel providers, best first: of the
    kernels that accept a call, the one whose provider stands first is bound. "reference" is appended when it is not
    listed. `attention_preference` does the same for the operators of attention, `extend_preference` for
    attention_extend alone where its order is another. `gives_memory_on_write` says that
    `zeros` costs nothing until it is written, `runs_native_kernels` that the compiled extension computes on it.

    A subclass that leaves out a fact or a method cannot be defined: PlatformError names what is missing. One that is
    only a base for others says `abstract=True`.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    kernel_preference: ClassVar[tuple[str, ...]]
    attention_preference: ClassVar[tuple[str, ...]]
    extend_preference: ClassVar[tuple[str, ...]] = ()
    gives_memory_on_write: ClassVar[bool] = False
    runs_native_kernels: ClassVar[bool] = False

    def __init_subclass__(cls, *, abstract: bool = False, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not abstract:
            _check_complete(cls)

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """None when a device of this family can be used here, else one line that says why not."""

    def is_broken(self) -> bool:
        """True when a device seems to be here and cannot be used: whoever is given another one is told why."""
        return False

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Facts about the first device."""

    @abstractmethod
    def memory(self, index: int = 0) -> MemoryFacts:
        """Memory of device `index` now."""

    @contextmanager
    def memory_use(self, index: int = 0) -> Iterator[MemoryUse]:
        """Measures what runs inside takes of device `index`; by default by what it kept of it, which for the caching
        allocators of accelerators is the most that it had."""
        use, before = MemoryUse(), self.memory(index)
        yield use
        self.synchronize()
        use.bytes = max(0, before.available_bytes - self.memory(index).available_bytes)

    def release_unused(self, index: int = 0) -> None:  # noqa: B027 - most devices keep nothing
        """Gives memory of device `index` back that nobody uses and that is only kept to be taken again."""

    def settle(self) -> None:  # noqa: B027 - most devices have no such memory
        """An engine was built: gives memory of this process back that only starting needed."""

    @abstractmethod
    def device(self, index: int = 0) -> torch.device:
        """Torch's handle of device `index`, ready for use."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything submitted so far has run."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """A large tensor of zeros on device `index`. A platform may take the memory when it is first written."""
        import torch

        return torch.zeros(shape, dtype=dtype, device=self.device(index))

    def set_num_threads(self, num_threads: int) -> None:  # noqa: B027 - most devices have no host threads to set
        """Use this many host threads for operators."""

    def new_stream(self, index: int = 0) -> torch.Stream | None:
        """One more queue of device `index`, or None where work runs in the order it is submitted in."""
        return None

    def new_event(self, index: int = 0) -> DeviceEvent | None:
        """A mark for the queue of device `index`, or None where work has run when its submission returns."""
        return None

    def new_graph(self, beside: DeviceGraph | None = None) -> DeviceGraph:
        """An empty graph, in the memory of a captured one if given: two such graphs never run at the same time.

        Raises PlatformError where `capabilities().has_graphs` is false.
        """
        raise PlatformError(f"platform {self.name} has no graphs; ask its capabilities before capturing one")


_FACTS = {"name": str, "device_type": str, "kernel_preference": tuple, "attention_preference": tuple}


def _check_complete(cls: type[Platform]) -> None:
    """Raises PlatformError naming every fact and method that a platform lacks."""
    methods = [
        f"{name}()" for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
    ]
    facts = [name for name in _FACTS if not hasattr(cls, name)]
    if methods or facts:
        raise PlatformError(
            f"platform class {cls.__name__} lacks {', '.join([*facts, *methods])}; "
            "lockstep.platforms.base.Platform says what each of them means"
        )
    for name, kind in _FACTS.items():
        if not isinstance(getattr(cls, name), kind):
            raise PlatformError(f"{cls.__name__}.{name} must be a {kind.__name__}, not {getattr(cls, name)!r}")
