"""What every platform must say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lockstep.core.capabilities import Capabilities

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory of one device, in bytes. `available_bytes` is what this process may still take."""

    total_bytes: int
    available_bytes: int


class Platform(ABC):
    """A family of devices. Subclasses state facts; nothing here guesses.

    `kernel_preference` orders kernel providers, best first: of the kernels that accept a call, the one whose
    provider stands first is bound. "reference" is appended when it is not listed.
    `attention_preference` does the same for attention backends. `gives_memory_on_write` says that `zeros` costs
    nothing until it is written.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    kernel_preference: ClassVar[tuple[str, ...]]
    attention_preference: ClassVar[tuple[str, ...]]
    gives_memory_on_write: ClassVar[bool] = False

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """None when a device of this family can be used here, else one line that says why not."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Facts about the first device."""

    @abstractmethod
    def memory(self, index: int = 0) -> MemoryFacts:
        """Memory of device `index` now."""

    @abstractmethod
    def device(self, index: int = 0) -> torch.device:
        """Torch's handle of device `index`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything submitted so far has run."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """A large tensor of zeros on device `index`. A platform may take the memory when it is first written."""
        import torch

        return torch.zeros(shape, dtype=dtype, device=self.device(index))

    def set_num_threads(self, num_threads: int) -> None:  # noqa: B027 - most devices have no host threads to set
        """Use this many host threads for operators."""
