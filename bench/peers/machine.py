"""What a measured process used of the machine, and what others used meanwhile. Linux: read from /proc."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_BUSY_FIELDS = (0, 1, 2, 5, 6)
"""user, nice, system, irq, softirq of the first line of /proc/stat; its manual page is proc_stat(5)."""
_STEAL_FIELD = 7


@dataclass(frozen=True)
class Processors:
    """Seconds of processor time, all cores together: used by anyone, stolen by the host, used by ended children."""

    busy_s: float
    stolen_s: float
    own_s: float

    @classmethod
    def now(cls) -> Processors:
        """Own time counts this process and those of its children that have ended and were waited for."""
        busy_s, stolen_s = parse_stat((_PROC / "stat").read_text(), os.sysconf("SC_CLK_TCK"))
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(busy_s, stolen_s, sum(one.ru_utime + one.ru_stime for one in used))

    def lost_since(self, before: Processors) -> float:
        """Seconds that were not ours between two readings: other processes', or stolen by the host."""
        others_s = self.busy_s - before.busy_s - (self.own_s - before.own_s)
        return max(0.0, others_s + self.stolen_s - before.stolen_s)


def parse_stat(text: str, ticks_per_s: int) -> tuple[float, float]:
    """Busy and stolen seconds since boot, from the text of /proc/stat."""
    ticks = [int(field) for field in text.split("\n", 1)[0].split()[1:]]
    return sum(ticks[field] for field in _BUSY_FIELDS) / ticks_per_s, ticks[_STEAL_FIELD] / ticks_per_s


def peak_rss_mb(pid: int) -> list[float]:
    """Peak resident memory in MB (10^6 bytes) of a living process, then of each of its living descendants.

    Memory belongs to a process, so each figure covers all threads. Shared pages count in every process.
    """
    return [_high_water_mb(one) for one in _tree(pid)]


def parse_high_water(status: str) -> float:
    """MB from the line VmHWM of /proc/PID/status, which counts in units of 1,024 bytes; 0 where there is none."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _high_water_mb(pid: int) -> float:
    try:
        return parse_high_water((_PROC / str(pid) / "status").read_text())
    except OSError:  # It ended since it was listed.
        return 0.0


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for children in (_PROC / str(one) / "task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found
