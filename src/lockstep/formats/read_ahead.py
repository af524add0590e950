"""Asks the system to read a model's weights before anybody does: the disk works while Python imports."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_CHUNK_BYTES = 64 * 2**20
_SHARE_OF_MEMORY = 0.5
"""More would push out what was read first before it is used."""


@cache
def read_ahead(path: Path) -> threading.Thread | None:
    """Starts a thread that has the weight files of a local model read into the system's cache, once for each path.

    `path` is a directory or a file; None where there is nothing to read or the system takes no such advice. What goes
    wrong is left to whoever opens the files.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    files = weight_files(path)
    if not files:
        return None
    thread = threading.Thread(target=_advise, args=(files,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def weight_files(path: Path) -> list[Path]:
    """The safetensors or GGUF files at a path, by name; none where there is no such path."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))


def _advise(files: Sequence[Path]) -> None:
    left_bytes = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _SHARE_OF_MEMORY)
    for file in files:
        try:
            with file.open("rb") as opened:
                file_bytes = min(os.fstat(opened.fileno()).st_size, left_bytes)
                for start in range(0, file_bytes, _CHUNK_BYTES):
                    count = min(_CHUNK_BYTES, file_bytes - start)
                    os.posix_fadvise(opened.fileno(), start, count, os.POSIX_FADV_WILLNEED)
        except OSError:
            return
        left_bytes -= file_bytes
