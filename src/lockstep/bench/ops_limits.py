"""What this machine's memory and processors do at best, measured in the same sitting as the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.bench.ops_timing import time_calls
from lockstep.platforms.base import Platform

_COPY_BYTES_DEVICE, _COPY_BYTES_HOST = 2**30, 2**27
_MATMUL_DEVICE, _MATMUL_HOST = 8192, 1024


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """`bytes_per_s` of a large copy, read and written; `flops_per_s` of a square product, None if not measured."""

    bytes_per_s: float
    flops_per_s: float | None
    matmul: str

    def shortest_s(self, num_bytes: int, num_flops: int) -> float:
        """The time that a call must take: of its memory traffic or of its arithmetic, whichever is longer."""
        arithmetic_s = num_flops / self.flops_per_s if self.flops_per_s else 0.0
        return max(num_bytes / self.bytes_per_s, arithmetic_s)

    def lines(self) -> list[str]:
        """For people."""
        text = f"limit: {self.bytes_per_s / 1e9:.0f} GB/s of a copy"
        if self.flops_per_s is not None:
            text += f", {self.flops_per_s / 1e12:.3g} TFLOP/s of {self.matmul}"
        return [text + ", both measured here" if self.flops_per_s else text + ", measured here"]


def measure_limits(platform: Platform, *, flops_dtype: torch.dtype | None) -> MachineLimits:
    """The limits of the platform's first device; arithmetic in `flops_dtype`, or not at all with None."""
    is_device = platform.capabilities().has_streams
    num_bytes = _COPY_BYTES_DEVICE if is_device else _COPY_BYTES_HOST
    device = platform.device()

    def new_copy() -> Callable[[], Any]:
        source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: target.copy_(source)

    bytes_per_s = 2 * num_bytes / time_calls(platform, new_copy, 2 * num_bytes).seconds.median
    if flops_dtype is None:
        return MachineLimits(bytes_per_s, None, "")
    side = _MATMUL_DEVICE if is_device else _MATMUL_HOST

    def new_product() -> Callable[[], Any]:
        left, right = (torch.randn(side, side, device=device).to(flops_dtype) for _ in range(2))
        return lambda: left @ right

    seconds = time_calls(platform, new_product, 3 * side * side * flops_dtype.itemsize).seconds.median
    return MachineLimits(
        bytes_per_s, 2 * side**3 / seconds, f"a {side} x {side} x {side} product in {flops_dtype}"
    )
