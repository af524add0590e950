"""Half of a step's attention: its leading single tokens, or the longer spans after them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lockstep.attention.backend import AttentionSpec, FreshHeads, SingleTokens, Span
from lockstep.attention.spans import Spans
from lockstep.core.errors import KernelError
from lockstep.kv.pool.pool import LayerKV
from lockstep.ops.attention_extend.page_lists import OwnedPages


class AttentionPart(ABC):
    """Plans the spans of one kind once a step, then serves every layer. `provider` is its kernel's.

    A part for single tokens whose `why_no_graphs` is None may run inside of a device graph, over a fixed plan: each
    replay then computes what the last `refill` wrote.
    """

    provider: str

    @property
    def why_no_graphs(self) -> str | None:
        """Why no graph can hold what `run` submits; None when one can."""
        return f"attention by {self.provider} is planned anew for each step"

    @abstractmethod
    def plan(self, spans: Sequence[Span], *, page_size: int, device: torch.device) -> Any:
        """What layers share of these spans, at least one."""

    @abstractmethod
    def run(
        self, plan: Any, q_TNH: torch.Tensor, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        """Writes out [T, N, H] of one layer: the rows of the spans in order, then zeros."""

    def shares_keys(self, spans: Spans) -> bool:
        """True when these single tokens have so many keys in common that a plan that `shares` is the better one."""
        return False

    @property
    def has_tables(self) -> bool:
        """Whether `single_tokens` tells of any plan."""
        return False

    def single_tokens(self, plan: Any) -> SingleTokens | None:
        """The tables of single tokens that share no keys, where plans have such; else None."""
        return None

    def takes_fresh(self, plan: Any) -> bool:
        """True when `run_fresh` computes these single tokens, of which none sees what another one stores."""
        return False

    def run_fresh(
        self, plan: Any, fresh: FreshHeads, kv: LayerKV, spec: AttentionSpec, out_TNH: torch.Tensor
    ) -> None:
        """What `run` computes, from heads that it makes ready, with keys and values that it stores.

        Raises KernelError where `takes_fresh` is False for every plan.
        """
        raise KernelError(f"attention by {self.provider} takes heads that are ready")

    def fixed_plan(
        self, num_keys_T: torch.Tensor, *, num_pages: int, page_size: int, shares: bool = False
    ) -> Any:
        """A plan in fixed memory for as many single tokens, of sequences of up to `num_pages` pages: all padding.

        `num_keys_T` (int32, on the device) is part of that memory, which others fill in stream order: the keys that
        each token of the step sees, 0 for padding. With `shares`, keys that several sequences have in common are read
        once. Raises KernelError where no graph can hold this part.
        """
        raise KernelError(f"no plan can be fixed: {self.why_no_graphs}")

    def refill(self, plan: Any, spans: Sequence[Span]) -> None:
        """Writes the rest of a fixed plan for other single tokens, in stream order; rows after them become padding.

        Raises KernelError when they do not fit.
        """
        raise KernelError(f"no plan is fixed: {self.why_no_graphs}")


def owned_pages(spans: Spans) -> OwnedPages:
    """The spans as the kernels of libraries read them."""
    return OwnedPages(spans.num_tokens_B, spans.num_keys_B, spans.page_ids_BP)
