"""What this process holds of the host's memory, and giving some of it back.

Linux tells through /proc (its manual pages are proc_pid_statm(5), proc_pid_status(5), proc_pid_clear_refs(5) and
proc_pid_smaps(5)); elsewhere nothing is known and nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROC = Path("/proc/self")
_SMALLEST_BYTES = 64 * 1024
"""Less than this of a mapping is not worth a call."""


def resident_bytes() -> int:
    """Memory that this process holds now, mapped files included; 0 where the system does not tell."""
    try:
        return int((_PROC / "statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def peak_bytes() -> int:
    """The most that it held at once, since its start or the last `forget_peak`."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def forget_peak() -> bool:
    """Starts `peak_bytes` anew; False where the system does not allow it."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_code() -> int:
    """Lets go of pages of code and constants that were read from libraries; returns how many bytes.

    Importing torch runs through tens of megabytes of registrations that nothing uses afterwards. What is used again is
    read again, from the system's cache of files. Mappings in which anything was ever written are left alone.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None
    if madvise is None:
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    try:
        lines = (_PROC / "smaps").read_text().splitlines()
    except OSError:
        return 0
    num_bytes = 0
    for start, end, resident in clean_code(lines):
        if madvise(start, end - start, mmap.MADV_DONTNEED) == 0:
            num_bytes += resident
    return num_bytes


def give_back_freed() -> None:
    """Lets go of pages that the C library keeps for its next allocations; it gives back only the end of its heap by
    itself. What it keeps after a model was loaded lies between weights, in pieces that few later tensors fit in.

    malloc_trim(3) is the GNU library's; elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def clean_code(lines: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Start, end and resident bytes of the mappings in the text of /proc/PID/smaps that hold files, cannot be written
    and hold nothing but what is in the file."""
    place, can_go, resident = "", False, 0
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            place, flags, inode = words[0], words[1], words[4]
            can_go = flags in ("r-xp", "r--p") and inode != "0" and words[-1] != "(deleted)"
        elif words[0] == "Rss:":
            resident = int(words[1]) * 1024
        elif words[0] == "Anonymous:" and can_go and words[1] == "0" and resident >= _SMALLEST_BYTES:
            start, end = place.split("-")
            yield int(start, 16), int(end, 16), resident
