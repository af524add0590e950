"""Shapes: R rows, V vocabulary."""

from __future__ import annotations

import torch


def argmax(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each row [R] and its place, int64 [R]: the first of equals, or of NaN where there is one."""
    best_R, token_ids_R = torch.max(logits_RV, dim=-1)
    return best_R, token_ids_R
