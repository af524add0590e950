"""What a device can do, as data. Everything defaults to "no"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Facts about one device of a platform; rooms ask these instead of device names.

    `platform` is the folder under platforms/. `device_type` is torch's word for it ("cpu", "cuda").
    `fast_dtypes` are the dtypes whose matrix products run at the device's full speed, best first. `collective_backend`
    is torch's word for what its ranks sum over; None where it has one rank.
    """

    platform: str
    device_type: str
    device_name: str
    num_devices: int = 1
    memory_bytes: int = 0
    fast_dtypes: tuple[str, ...] = ("float32",)
    features: frozenset[str] = frozenset()
    has_graphs: bool = False
    has_streams: bool = False
    has_triton: bool = False
    collective_backend: str | None = None
    num_threads: int = 1

    def has(self, feature: str) -> bool:
        """True when the device states the named feature, e.g. "avx512_bf16" or "fp8"."""
        return feature in self.features
