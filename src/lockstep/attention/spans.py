"""The spans of a step as arrays, so that what is planned for many sequences takes no Python for each of them.

Shapes: B sequences, P pages of the longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, overload

import numpy as np
import torch

from lockstep.attention.backend import Span

Stage = Callable[[np.ndarray], torch.Tensor]
"""Gives an array as a host tensor that the device may copy from later."""


class Stager(Protocol):
    """Brings what the host planned to the device."""

    def stage(self, array: np.ndarray) -> torch.Tensor:
        """The array as a host tensor that the device may copy from later."""
        ...

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        """Copies the array to where the device reads it, in stream order."""
        ...


class PlainMemory:
    """The array itself, for devices that copy at once."""

    def stage(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        target.copy_(torch.from_numpy(array))


PLAIN = PlainMemory()


class Spans(Sequence[Span]):
    """A sequence of Span. `page_ids_BP` holds a sequence's pages at the beginning of its row, and anything after.

    The last `num_wanted_B` tokens of each decide or are scored, all of them when that is None: who computes a model
    as a whole may leave out the end of the others.
    """

    def __init__(
        self,
        start_B: np.ndarray,
        num_tokens_B: np.ndarray,
        page_ids_BP: np.ndarray,
        page_size: int,
        stager: Stager = PLAIN,
        num_wanted_B: np.ndarray | None = None,
    ) -> None:
        self.start_B = start_B
        self.num_tokens_B = num_tokens_B
        self.num_keys_B = start_B + num_tokens_B
        self.page_ids_BP = page_ids_BP
        self.page_size = page_size
        self.stager = stager
        self.num_wanted_B = num_tokens_B if num_wanted_B is None else num_wanted_B

    @classmethod
    def of(cls, spans: Sequence[Span], page_size: int) -> Spans:
        """The same spans as arrays."""
        if isinstance(spans, Spans):
            return spans
        start_B = np.array([span.start for span in spans], dtype=np.int64)
        num_tokens_B = np.array([span.num_tokens for span in spans], dtype=np.int64)
        page_ids_BP = np.zeros(
            (len(spans), max((len(span.page_ids) for span in spans), default=0)), dtype=np.int32
        )
        for row_P, span in zip(page_ids_BP, spans, strict=True):
            row_P[: len(span.page_ids)] = span.page_ids
        return cls(start_B, num_tokens_B, page_ids_BP, page_size)

    @property
    def stage(self) -> Stage:
        """Gives arrays of the step to its device."""
        return self.stager.stage

    @property
    def most_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-int(self.num_keys_B.max(initial=0)) // self.page_size)

    @property
    def num_leading_single(self) -> int:
        """Spans of one token before the first longer one."""
        is_longer_B = self.num_tokens_B != 1
        return int(is_longer_B.argmax()) if is_longer_B.any() else len(self)

    def page_table(self, width: int) -> np.ndarray:
        """int32 [B, width]: every sequence's pages, then zeros or pages that nobody asks for."""
        table_BP = np.zeros((len(self), width), dtype=np.int32)
        known = min(width, self.page_ids_BP.shape[1])
        table_BP[:, :known] = self.page_ids_BP[:, :known]
        return table_BP

    def __len__(self) -> int:
        return len(self.start_B)

    def __iter__(self) -> Iterator[Span]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Span: ...

    @overload
    def __getitem__(self, index: slice) -> Spans: ...

    def __getitem__(self, index: int | slice) -> Span | Spans:
        if isinstance(index, slice):
            rows = (self.start_B[index], self.num_tokens_B[index], self.page_ids_BP[index])
            return Spans(*rows, self.page_size, self.stager, self.num_wanted_B[index])
        num_pages = -(-int(self.num_keys_B[index]) // self.page_size)
        page_ids = self.page_ids_BP[index, :num_pages].tolist()
        return Span(int(self.start_B[index]), int(self.num_tokens_B[index]), page_ids)
