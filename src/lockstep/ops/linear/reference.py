"""Shapes: T rows, I inputs, O outputs."""

from __future__ import annotations

import torch


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias; sums in float32 or wider, one rounding to the dtype of x."""
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)
