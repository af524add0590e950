"""Where the memory of a rank goes, and how many pages the KV pool gets."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.errors import OutOfMemory


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of a rank's memory."""

    name: str
    bytes: int
    note: str = ""


def pages_that_fit(
    *, free_bytes: int, total_bytes: int, fraction: float, workspace_bytes: int, page_bytes: int, min_pages: int
) -> int:
    """Pages for a pool beside weights that are already loaded, when the whole process may take `fraction`.

    `free_bytes` is what the device has left now, `workspace_bytes` the measured peak of the largest step.
    Raises OutOfMemory, saying by how much, when fewer than `min_pages` fit.
    """
    budget_bytes = int(free_bytes - total_bytes * (1 - fraction)) - workspace_bytes
    num_pages = max(0, budget_bytes) // page_bytes
    if num_pages < min_pages:
        missing = min_pages * page_bytes - max(0, budget_bytes)
        raise OutOfMemory(
            f"the KV pool lacks {missing / 2**30:.2f} GiB for one request beside the weights; lower --context-length "
            "or --chunked-prefill-size, raise --mem-fraction-static, or use more ranks (--tp)"
        )
    return num_pages
