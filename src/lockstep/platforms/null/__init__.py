"""A device that counts and computes nothing: for scheduling and protocol tests with no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.base import MemoryFacts, Platform

if TYPE_CHECKING:
    import torch


class NullPlatform(Platform):
    """Tensors live on torch's meta device: they have shapes and no values."""

    name = "null"
    device_type = "meta"
    kernel_preference = ("reference",)
    attention_preference = ("torch",)

    def unavailable_reason(self) -> str | None:
        return None

    def capabilities(self) -> Capabilities:
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name="null",
            fast_dtypes=("float32", "bfloat16"),
            # Ranks meet, and have nothing to sum.
            collective_backend="gloo",
        )

    def memory(self, index: int = 0) -> MemoryFacts:
        return MemoryFacts(2**40, 2**40)

    def device(self, index: int = 0) -> torch.device:
        import torch

        return torch.device("meta")

    def synchronize(self) -> None:
        """Nothing was submitted."""
