"""Where the memory of a rank goes, and how many pages the KV pool gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.core.errors import OutOfMemory

MOST_FRACTION = 0.97
"""A larger --mem-fraction-static is not worth proposing: drivers and fragments need the rest."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of the memory of a rank's device. `is_own` is false for what this rank does not hold."""

    name: str
    bytes: int
    note: str = ""
    is_own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """What the largest steps take beside weights and pages: while they run and in recorded graphs, as measured, and to
    stage what goes to the host and comes back."""

    workspace_bytes: int = 0
    graph_bytes: int = 0
    staging_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.workspace_bytes + self.graph_bytes + self.staging_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBudget:
    """What a KV pool may be made of, beside weights that are already loaded.

    The whole process may take `fraction` of the `total_bytes` of its device, of which `free_bytes` are left. A step has
    up to `chunk_tokens` rows on each of `num_ranks` that share `weight_bytes` out; `possible_ranks` could do so.
    """

    free_bytes: int
    total_bytes: int
    fraction: float
    step: StepMemory
    page_bytes: int
    weight_bytes: int
    chunk_tokens: int
    num_ranks: int
    possible_ranks: Sequence[int]

    def num_pages(self, at_least: int) -> int:
        """Pages that fit. Raises OutOfMemory, saying by how much and what to change, when fewer than `at_least` do."""
        left_bytes = int(self.free_bytes - self.total_bytes * (1 - self.fraction)) - self.step.total_bytes
        num_pages = max(0, left_bytes) // self.page_bytes
        if num_pages >= at_least:
            return num_pages
        missing_bytes = at_least * self.page_bytes - left_bytes
        remedies = ", ".join(self._remedies(missing_bytes)) or "a smaller model, or one in fewer bits"
        raise OutOfMemory(
            f"{missing_bytes / 2**30:.2f} GiB are missing for the smallest KV pool beside weights "
            f"({self.weight_bytes / 2**30:.2f} GiB) and the largest step ({self.step.total_bytes / 2**30:.2f} GiB); "
            f"what would fit: {remedies}"
        )

    def _remedies(self, missing_bytes: int) -> list[str]:
        found = []
        workspace_bytes = self.step.workspace_bytes
        if workspace_bytes > missing_bytes:
            chunk_tokens = int(self.chunk_tokens * (1 - missing_bytes / workspace_bytes)) // 256 * 256
            found += [f"--chunked-prefill-size {chunk_tokens}"] if chunk_tokens else []
        fraction = self.fraction + missing_bytes / self.total_bytes
        if fraction <= MOST_FRACTION:
            found.append(f"--mem-fraction-static {fraction + 0.005:.2f}")
        enough = (
            ranks
            for ranks in self.possible_ranks
            if ranks > self.num_ranks and self.weight_bytes * (1 - self.num_ranks / ranks) >= missing_bytes
        )
        return found + [f"--tp {ranks}" for ranks in list(enough)[:1]]
