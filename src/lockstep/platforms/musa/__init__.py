"""Moore Threads GPUs through the package torch_musa, which adds the device "musa" to torch.

Written from the package's documentation and not yet run on such a GPU: streams and bfloat16 are what torch says of the
device, and whatever a run would have to show (graphs, collectives, fp8, fast attention) is not stated.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.accelerator import TorchAccelerator, has_package
from lockstep.platforms.printed_devices import make_printed_devices_importable

if TYPE_CHECKING:
    import torch

EXTENSION = "torch_musa"


class MusaPlatform(TorchAccelerator):
    """Moore Threads GPUs. Importing torch_musa registers the device, so it happens when the device is asked for."""

    name = "musa"
    device_type = "musa"
    kernel_preference = ("musa", "triton", "torch", "reference")
    attention_preference = ("triton", "torch")

    def unavailable_reason(self) -> str | None:
        if not has_package(EXTENSION):
            return f"the package {EXTENSION} is not installed"
        if not self._module().is_available():
            return "no Moore Threads GPU with a working driver was found"
        return None

    def capabilities(self) -> Capabilities:
        musa = self._module()
        facts = musa.get_device_properties(0)
        has_triton = has_package("triton")
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name=facts.name,
            num_devices=musa.device_count(),
            memory_bytes=facts.total_memory,
            fast_dtypes=self._fast_dtypes(),
            features=frozenset({"triton"} if has_triton else ()),
            has_streams=self._has_streams(),
            has_triton=has_triton,
        )

    def device(self, index: int = 0) -> torch.device:
        self._module()
        make_printed_devices_importable()
        return super().device(index)

    def _module(self) -> Any:
        importlib.import_module(EXTENSION)
        return super()._module()
