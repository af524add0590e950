"""Shapes: T new tokens, N query heads, K KV heads, H head dim, P pages, S page size, B sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def paged_attention(
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    spans: Sequence[Span],
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of each span's tokens over the keys of its own sequence.

    A token at position p sees keys at positions max(0, p - window + 1) .. p (window 0: from 0). Scores are capped
    as cap * tanh(score / cap) when `soft_cap` is not 0. Query head n reads KV head n // (N / K). float32 maths, one
    rounding to the dtype of q. Rows beyond the spans' tokens are padding and give zeros.
    """
    out_TNH = torch.zeros_like(q_TNH)
    group = q_TNH.shape[1] // k_KPSH.shape[0]
    row = 0
    for span in spans:
        pages = torch.as_tensor(list(span.page_ids), dtype=torch.int64, device=q_TNH.device)
        length = span.num_kv_tokens
        k_NLH, v_NLH = (
            pool.index_select(1, pages).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
            for pool in (k_KPSH, v_KPSH)
        )
        q_NTH = q_TNH[row : row + span.num_tokens].float().transpose(0, 1)
        scores_NTL = q_NTH @ k_NLH.transpose(1, 2) * scale
        if soft_cap:
            scores_NTL = soft_cap * torch.tanh(scores_NTL / soft_cap)
        position = torch.arange(span.start, length, device=q_TNH.device)[:, None]
        key = torch.arange(length, device=q_TNH.device)[None]
        hidden = (key > position) | ((key <= position - window) if window else False)
        weights = torch.softmax(scores_NTL.masked_fill(hidden, float("-inf")), dim=-1)
        out_TNH[row : row + span.num_tokens] = (weights @ v_NLH).transpose(0, 1).to(q_TNH.dtype)
        row += span.num_tokens
    return out_TNH
