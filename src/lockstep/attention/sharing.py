"""Sequences whose leading pages are the same ones, found on the host: keys that attention may read once for all.

Shapes: B sequences, P pages, M members of a group, T tiles of R sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.attention.spans import Spans
from lockstep.ops.attention_decode_shared.tiles import ROWS

MOST_GROUPS = 8
"""Groups of sequences that share pages, in one step: those that save most."""

FEWEST_SAVED = 8192
"""Keys that need not be read again, from which on a second launch in each layer pays."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What attention_decode_shared wants to know, int32: how many leading keys a sequence shares [B], and with whom
    [T, R]; -1 stands for nobody."""

    shared_keys_B: np.ndarray
    tiles_TR: np.ndarray


def most_tiles(num_sequences: int) -> int:
    """Tiles that hold the groups of so many sequences, however they are spread."""
    return -(-num_sequences // ROWS) + MOST_GROUPS - 1


def find_sharing(spans: Spans) -> Sharing | None:
    """The sharing that saves most keys of these single tokens, or None where it does not pay.

    Groups are disjoint; where sequences share much with some and little with others, the greater sum counts.
    """
    # Not the page of the newest key: each sequence keeps a key of its own.
    full_B = (spans.num_keys_B - 1) // spans.page_size
    if int(full_B.sum()) * spans.page_size < FEWEST_SAVED:
        return None
    groups = sorted(
        _groups(spans.page_ids_BP, full_B, np.arange(len(spans)), 0), key=lambda group: -group.saved
    )
    groups = [group for group in groups[:MOST_GROUPS] if group.saved]
    if sum(group.saved for group in groups) * spans.page_size < FEWEST_SAVED:
        return None
    shared_keys_B = np.zeros(len(spans), dtype=np.int32)
    for group in groups:
        shared_keys_B[group.members_M] = group.num_pages * spans.page_size
    return Sharing(shared_keys_B, np.stack([tile_R for group in groups for tile_R in group.tiles()]))


class SharingFinder:
    """find_sharing from step to step: what was found holds as long as the same sequences follow each other."""

    def __init__(self) -> None:
        self._pages_BP = np.zeros((0, 1), dtype=np.int32)
        self._found: Sharing | None = None
        self._num_keys = 0

    def of(self, spans: Spans) -> Sharing | None:
        """What find_sharing found for sequences with these pages; the same object while it is the same."""
        width = self._pages_BP.shape[1]
        num_keys = int(spans.num_keys_B.sum())
        if self._found is None:
            # Short sequences may come to share enough once they have grown by an eighth.
            is_stale = 8 * num_keys > 9 * self._num_keys
        else:
            # What lies behind a sequence's pages may be another's, which had them before.
            is_stale = (
                len(spans) == len(self._pages_BP) and (spans.num_keys_B <= self._found.shared_keys_B).any()
            )
        if is_stale or not np.array_equal(spans.page_ids_BP[:, :width], self._pages_BP):
            self._found, self._num_keys = find_sharing(spans), num_keys
            shared = 0 if self._found is None else int(self._found.shared_keys_B.max()) // spans.page_size
            self._pages_BP = spans.page_ids_BP[:, : max(1, shared)].copy()
        return self._found


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that have their first `num_pages` pages in common."""

    members_M: np.ndarray
    num_pages: int

    @property
    def saved(self) -> int:
        """Pages that need not be read again."""
        return (len(self.members_M) - 1) * self.num_pages

    def tiles(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.members_M), ROWS):
            tile_R = np.full(ROWS, -1, dtype=np.int32)
            members = self.members_M[first : first + ROWS]
            tile_R[: len(members)] = members
            yield tile_R


def _groups(
    page_ids_BP: np.ndarray, full_B: np.ndarray, members_M: np.ndarray, num_alike: int
) -> Sequence[_Group]:
    """The groups of these sequences, alike in their first `num_alike` pages, that save most: one, or several."""
    shortest = int(full_B[members_M].min())
    pages_MP = page_ids_BP[members_M, num_alike:shortest]
    differs_P = (pages_MP != pages_MP[0]).any(axis=0)
    num_pages = num_alike + int(differs_P.argmax() if differs_P.any() else len(differs_P))
    together = _Group(members_M, num_pages)
    longer_M = members_M[full_B[members_M] > num_pages]
    if len(longer_M) < 2:
        return [together]
    _, branch_M, counts = np.unique(page_ids_BP[longer_M, num_pages], return_inverse=True, return_counts=True)
    # Few may have much in common: those branches first that have most pages and not only one sequence.
    pages_of_branch = np.bincount(branch_M, weights=full_B[longer_M]) * (counts > 1)
    apart: list[_Group] = []
    for each in np.argsort(-pages_of_branch)[:MOST_GROUPS]:
        branch = longer_M[branch_M == each]
        found = _groups(page_ids_BP, full_B, branch, num_pages + 1) if len(branch) > 1 else ()
        # Each of them would save the pages that all have in common.
        if sum(group.saved for group in found) > len(branch) * num_pages:
            apart += found
    taken = [group.members_M for group in apart]
    rest_M = np.setdiff1d(members_M, np.concatenate(taken)) if taken else members_M
    groups = [*apart, _Group(rest_M, num_pages)] if len(rest_M) else apart
    return groups if sum(group.saved for group in groups) > together.saved else [together]
