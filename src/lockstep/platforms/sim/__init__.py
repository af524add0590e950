"""A device that torch does not know, computing on the host: the stand-in for hardware that is not at hand.

It is torch's PrivateUse1 device under the name "sim". Whatever assumes one of torch's own devices fails on it as it
would fail on a new accelerator. Torch lets Python give such a device operators but no allocator: what allocates a bare
storage (torch.save, copy.deepcopy) must be given `tensor.cpu()`, or it ends the process.

Read first: this file, then `operators.py`, then `host_memory.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.base import MemoryFacts, Platform
from lockstep.platforms.cpu import CpuPlatform, usable_cores

if TYPE_CHECKING:
    import torch


class SimPlatform(Platform):
    """One simulated device. Torch learns of it when the device is first asked for, once for the whole process."""

    name = "sim"
    device_type = "sim"
    kernel_preference = ("torch", "reference")
    attention_preference = ("torch",)

    def __init__(self) -> None:
        self._host = CpuPlatform()

    def unavailable_reason(self) -> str | None:
        import torch

        taken = torch._C._get_privateuse1_backend_name()
        if taken not in ("privateuseone", self.device_type):
            return f"torch's one place for a foreign device is taken by {taken!r} in this process"
        return None

    def capabilities(self) -> Capabilities:
        # No memory of its own: the cpu platform states the host's.
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name="simulated on the host",
            num_threads=usable_cores(),
        )

    def memory(self, index: int = 0) -> MemoryFacts:
        return self._host.memory()

    def device(self, index: int = 0) -> torch.device:
        import torch

        from lockstep.platforms.sim.registration import register

        register()
        return torch.device(self.device_type, index)

    def synchronize(self) -> None:
        """Operators on the host have run when they return."""

    def set_num_threads(self, num_threads: int) -> None:
        self._host.set_num_threads(num_threads)
