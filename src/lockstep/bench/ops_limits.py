"""What this machine's memory and processors do at best, measured in the same sitting as the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.bench.ops_timing import Call, time_calls
from lockstep.platforms.base import Platform

DATASHEET = "the datasheet"
DATASHEET_BYTES_PER_S: Mapping[str, float] = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
}
"""Bandwidth of a device's memory as its maker states it, by the name that the driver gives."""

_STREAM_BYTES_DEVICE, _STREAM_BYTES_HOST = 2**30, 2**27
_MATMUL_DEVICE, _MATMUL_HOST = 8192, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """`bandwidths` are bytes per second and where each is from; the largest is the limit.

    `flops_per_s` is of the square product that `matmul` names, None if not measured. `cache_bytes` is the size of the
    last cache before the memory, None where nobody tells.
    """

    bandwidths: Mapping[str, float]
    flops_per_s: float | None = None
    matmul: str = ""
    cache_bytes: int | None = None

    @property
    def bandwidth_from(self) -> str:
        """Which of the bandwidths is the limit."""
        return max(self.bandwidths, key=lambda name: self.bandwidths[name])

    @property
    def bytes_per_s(self) -> float:
        """The limit of the memory."""
        return self.bandwidths[self.bandwidth_from]

    def shortest_s(self, num_bytes: int, num_flops: int) -> float:
        """The time that a call must take: of its memory traffic or of its arithmetic, whichever is longer."""
        arithmetic_s = num_flops / self.flops_per_s if self.flops_per_s else 0.0
        return max(num_bytes / self.bytes_per_s, arithmetic_s)

    def fits_cache(self, num_bytes: int) -> bool:
        """Whether a cache holds so much, so that the memory is no limit. False where its size is not known."""
        return num_bytes <= (self.cache_bytes or 0)

    def lines(self) -> list[str]:
        """For people."""
        others = {name: rate for name, rate in self.bandwidths.items() if name != self.bandwidth_from}
        text = f"limit: {self.bytes_per_s / 1e9:.0f} GB/s of {self.bandwidth_from}"
        if others:
            text += f" ({', '.join(f'{name} reaches {rate / 1e9:.0f}' for name, rate in others.items())})"
        if self.flops_per_s is not None:
            text += f", {self.flops_per_s / 1e12:.3g} TFLOP/s of {self.matmul}"
        return [f"{text}; measured here{', but for the datasheet' * (DATASHEET in self.bandwidths)}"]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "bytes_per_s": self.bytes_per_s,
            "bytes_per_s_from": self.bandwidth_from,
            "bandwidths": dict(self.bandwidths),
            "flops_per_s": self.flops_per_s,
            "matmul": self.matmul,
            "cache_bytes": self.cache_bytes,
        }


def measure_limits(platform: Platform, *, flops_dtype: torch.dtype | None) -> MachineLimits:
    """The limits of the platform's first device; arithmetic in `flops_dtype`, or not at all with None.

    Of several repeats the fastest counts: a limit is what can be reached.
    """
    capabilities = platform.capabilities()
    bandwidths = dict(_streams(platform))
    if capabilities.device_name in DATASHEET_BYTES_PER_S:
        bandwidths[DATASHEET] = DATASHEET_BYTES_PER_S[capabilities.device_name]
    cache_bytes = _cache_bytes(platform)
    if flops_dtype is None:
        return MachineLimits(bandwidths=bandwidths, cache_bytes=cache_bytes)
    side = _MATMUL_DEVICE if capabilities.has_streams else _MATMUL_HOST

    def new_product() -> Call:
        left, right = (torch.randn(side, side, device=platform.device()).to(flops_dtype) for _ in range(2))
        return lambda: left @ right

    seconds = time_calls(platform, new_product, 3 * side * side * flops_dtype.itemsize).seconds.min
    return MachineLimits(
        bandwidths=bandwidths,
        flops_per_s=2 * side**3 / seconds,
        matmul=f"a {side} x {side} x {side} product in {flops_dtype}",
        cache_bytes=cache_bytes,
    )


def _streams(platform: Platform) -> Iterator[tuple[str, float]]:
    """Bytes per second of the plainest ways through memory, by name; which is the best depends on the device."""
    device = platform.device()
    num_bytes = _STREAM_BYTES_DEVICE if platform.capabilities().has_streams else _STREAM_BYTES_HOST

    def values() -> torch.Tensor:
        return torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)

    def new_copy() -> Call:
        source, target = values(), values()
        return lambda: target.copy_(source)

    def new_negation() -> Call:
        source, target = values(), values()
        return lambda: torch.neg(source, out=target)

    def new_maximum() -> Call:
        source = values()
        return source.amax

    streams: tuple[tuple[str, Callable[[], Call], int], ...] = (
        ("a copy", new_copy, 2 * num_bytes),
        ("a negation", new_negation, 2 * num_bytes),
        ("reading alone", new_maximum, num_bytes),
    )
    for name, new_call, moved in streams:
        yield name, moved / time_calls(platform, new_call, moved).seconds.min


def _cache_bytes(platform: Platform) -> int | None:
    """Of the last cache before the memory: the device's, or the host's where that computes."""
    if platform.capabilities().has_streams:
        device = platform.device()
        return getattr(torch.get_device_module(device).get_device_properties(device), "L2_cache_size", None)
    name = "SC_LEVEL3_CACHE_SIZE"
    return (os.sysconf(name) if name in os.sysconf_names else 0) or None
