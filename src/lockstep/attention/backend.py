"""What an attention backend is, and what it is told of a step and of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lockstep.core.errors import KernelError
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


class FreshHeads(NamedTuple):
    """Heads [T, A, H] of new tokens (query, then key, then value heads) as their product gave them, and what makes
    them ready: the weights of their norms, None for no norm, and the angles [T, H / 2] of their rotation."""

    heads_TAH: torch.Tensor
    q_weight_H: torch.Tensor | None
    k_weight_H: torch.Tensor | None
    eps: float
    cos_TR2: torch.Tensor
    sin_TR2: torch.Tensor

    def leading(self, num_rows: int) -> FreshHeads:
        """The heads of the first so many tokens."""
        norms = (self.q_weight_H, self.k_weight_H, self.eps)
        return FreshHeads(self.heads_TAH[:num_rows], *norms, self.cos_TR2[:num_rows], self.sin_TR2[:num_rows])


class SingleTokens(NamedTuple):
    """Where keys of single tokens lie that share none: page tables [B, P] and lengths [B], int32, 0 for padding."""

    page_table_BP: torch.Tensor
    num_keys_B: torch.Tensor


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

    @property
    def has_tables(self) -> bool:
        """Whether `single_tokens` tells of any plan."""
        return False

    def single_tokens(self, plan: Any) -> SingleTokens | None:
        """Of a plan of nothing but single tokens, for kernels that attend by themselves; None of any other."""
        return None

    def takes_fresh(self, plan: Any) -> bool:
        """True when every layer of this plan is to be computed by `run_fresh`."""
        return False

    def run_fresh(self, plan: Any, fresh: FreshHeads, kv: LayerKV, spec: AttentionSpec) -> torch.Tensor:
        """out [T, N, H] in the pool's dtype, for one layer whose new keys and values are stored on the way.

        Raises KernelError where `takes_fresh` is False for every plan.
        """
        raise KernelError(f"attention by {self.name} takes heads that are ready")
