"""What an attention backend is, and what it is told of a step and of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.kv.pool.pool import LayerKV


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens [start, start + num_tokens) of one sequence, whose keys and values lie in `page_ids` in order."""

    start: int
    num_tokens: int
    page_ids: Sequence[int]

    @property
    def num_kv_tokens(self) -> int:
        """Keys that the last new token may see, its own included."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends. `window` 0 sees every earlier token; `soft_cap` 0 is none; `sinks_N` is a logit of each
    head that joins the softmax without a value."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks_N: torch.Tensor | None = None


class AttentionBackend(ABC):
    """Plans a step once on the host, then serves every layer of it. `name` is its provider's."""

    name: str

    @abstractmethod
    def plan(
        self, spans: Sequence[Span], *, page_size: int, windows: Sequence[int], device: torch.device
    ) -> Any:
        """Everything about a step that its layers share. Rows of q follow the spans' order; more are padding."""

    @abstractmethod
    def run(self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        """out [T, N, H] in the dtype of q, for one layer whose new keys and values are already stored.

        Rows of padding are zeros.
        """

    def run_into(
        self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        """The same, written to `out_TNH`."""
        out_TNH.copy_(self.run(plan, q_TNH, kv, spec))
