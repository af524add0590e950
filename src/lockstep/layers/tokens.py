"""The tokens that a step computes.

Shapes: T rows, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token for each row: that of known_T, and that of last_S which sources_T names beside it.

    All int64. last_S holds what sequences sampled last, which the host may not know yet; its first entry is 0.
    """

    known_T: torch.Tensor
    sources_T: torch.Tensor | None = None
    last_S: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.known_T)

    def ids(self) -> torch.Tensor:
        """int64 [T]."""
        if self.sources_T is None or self.last_S is None:
            return self.known_T
        return self.last_S.index_select(0, self.sources_T) + self.known_T
