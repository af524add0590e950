"""Who owns which pages, on the host: for libraries that plan a call there.

Shapes: B sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Stage = Callable[[np.ndarray], torch.Tensor]
"""Gives an array as a host tensor that the device may copy from later."""


@dataclass(frozen=True, slots=True)
class OwnedPages:
    """New tokens, keys in all, and in page_table[b] the pages of each sequence, then anything."""

    num_rows_B: np.ndarray
    num_keys_B: np.ndarray
    page_table_BP: np.ndarray

    @classmethod
    def read(
        cls, page_table_BP: torch.Tensor, cu_rows_B1: torch.Tensor | None, num_keys_B: torch.Tensor
    ) -> OwnedPages:
        """Those of a call of attention_extend, or with None of attention_decode. Waits for the device."""
        num_keys = num_keys_B.cpu().numpy()
        one_each = np.ones_like(num_keys)
        num_rows = one_each if cu_rows_B1 is None else np.diff(cu_rows_B1.cpu().numpy())
        return cls(num_rows, num_keys, page_table_BP.cpu().numpy())

    def __len__(self) -> int:
        return len(self.num_keys_B)


@dataclass(frozen=True, slots=True)
class PageLists:
    """int32 tensors on the host. Sequence b has the rows row_starts[b] .. row_starts[b + 1] of q and the pages
    pages[page_starts[b]] .. pages[page_starts[b + 1]], the last of them with last_page_tokens[b] keys.

    A sequence without keys has no pages. All four lie in one piece of staged memory.
    """

    row_starts_B1: torch.Tensor
    page_starts_B1: torch.Tensor
    last_page_tokens_B: torch.Tensor
    pages_P: torch.Tensor
    num_rows: int
    most_rows: int

    @classmethod
    def of(
        cls,
        owned: OwnedPages,
        page_size: int,
        stage: Stage = torch.from_numpy,
        *,
        num_sequences: int | None = None,
    ) -> PageLists:
        """The sequences' lists; with `num_sequences`, padded by single tokens of sequences without keys."""
        missing = (0, 0 if num_sequences is None else num_sequences - len(owned))
        num_rows = np.pad(owned.num_rows_B, missing, constant_values=1)
        num_keys = np.pad(owned.num_keys_B, missing)
        num_pages = -(-num_keys // page_size)
        used = np.arange(owned.page_table_BP.shape[1]) < num_pages[: len(owned), None]
        last_page_tokens = num_keys - np.maximum(num_pages - 1, 0) * page_size
        parts = (_starts(num_rows), _starts(num_pages), last_page_tokens, owned.page_table_BP[used])
        packed = stage(np.concatenate(parts, dtype=np.int32))
        rows, starts, last, pages = packed.split([len(part) for part in parts])
        return cls(rows, starts, last, pages, int(num_rows.sum()), int(num_rows.max(initial=0)))


def _starts(counts_B: np.ndarray) -> np.ndarray:
    """0, then the sums of the counts up to each."""
    return np.concatenate(([0], counts_B.cumsum()))
