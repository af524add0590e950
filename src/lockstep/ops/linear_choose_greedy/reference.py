"""Shapes: R rows, I inputs, V outputs (the vocabulary), S sequences."""

from __future__ import annotations

import torch

from lockstep.ops.choose_greedy.reference import choose_greedy
from lockstep.ops.linear.reference import linear


def linear_choose_greedy(
    x_RI: torch.Tensor, weight_VI: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor
) -> torch.Tensor:
    """choose_greedy of the scores that linear gives, in the dtype of the rows: int32 [2, R]."""
    return choose_greedy(linear(x_RI, weight_VI), owners_R, last_tokens_S)
