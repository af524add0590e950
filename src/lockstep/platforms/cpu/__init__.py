"""Processors: native kernels where they were built, else stock PyTorch operators with oneDNN's packed products."""

from __future__ import annotations

import math
import mmap
import os
import platform as machine
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.core.capabilities import Capabilities
from lockstep.platforms.base import MemoryFacts, MemoryUse, Platform
from lockstep.platforms.cpu.process_memory import (
    forget_peak,
    give_back_code,
    give_back_freed,
    peak_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    import torch

_FEATURE_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)


def usable_cores() -> int:
    """Cores this process may run on: the affinity mask, cut by a cgroup CPU quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


@cache
def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Name and instruction-set flags, from the kernel; empty where it does not tell."""
    name, flags = machine.processor() or machine.machine(), frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    except OSError:
        pass
    return name, frozenset(flag for flag in _FEATURE_FLAGS if flag in flags)


_CGROUP = Path("/sys/fs/cgroup")


def _memory_limit_bytes() -> int | None:
    """The cgroup's memory limit, if one is set."""
    try:
        text = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _memory_taken_bytes() -> int:
    """What the cgroup's processes take of it, without files that are kept in memory while nobody wants it."""
    try:
        taken = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, taken - int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


class CpuPlatform(Platform):
    """The host processor. Always available."""

    name = "cpu"
    device_type = "cpu"
    kernel_preference = ("native", "onednn", "numpy", "torch", "reference")
    attention_preference = ("native", "torch")
    gives_memory_on_write = True
    runs_native_kernels = True

    def unavailable_reason(self) -> str | None:
        return None

    def capabilities(self) -> Capabilities:
        name, features = _cpuinfo()
        fast_bf16 = bool(features & {"avx512_bf16", "amx_bf16", "bf16"})
        return Capabilities(
            platform=self.name,
            device_type=self.device_type,
            device_name=name,
            memory_bytes=self.memory().total_bytes,
            fast_dtypes=("bfloat16", "float32") if fast_bf16 else ("float32",),
            features=features,
            collective_backend="gloo",
            num_threads=usable_cores(),
        )

    def memory(self, index: int = 0) -> MemoryFacts:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        total = page_bytes * os.sysconf("SC_PHYS_PAGES")
        available = page_bytes * os.sysconf("SC_AVPHYS_PAGES")
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
        except (OSError, ValueError):
            pass
        limit = _memory_limit_bytes()
        if limit is not None:
            left = max(0, limit - _memory_taken_bytes())
            total, available = min(total, limit), min(available, left)
        return MemoryFacts(total, available, resident_bytes())

    @contextmanager
    def memory_use(self, index: int = 0) -> Iterator[MemoryUse]:
        use, before = MemoryUse(), resident_bytes()
        watches = forget_peak()
        yield use
        use.bytes = max(0, (peak_bytes() if watches else resident_bytes()) - before)

    def settle(self) -> None:
        give_back_freed()
        give_back_code()

    def device(self, index: int = 0) -> torch.device:
        import torch

        return torch.device("cpu")

    def synchronize(self) -> None:
        """Operators on the host have run when they return."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """Anonymous memory, which the system gives page by page as it is written: a KV pool that is sized for many
        requests costs what the running ones use."""
        import torch

        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)

    def set_num_threads(self, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
