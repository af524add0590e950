"""Shapes: T rows, I inputs, O outputs."""

from __future__ import annotations

import torch

from lockstep.ops.grouped_weight import GroupedWeight


def quant_linear(x_TI: torch.Tensor, weight: GroupedWeight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias with the weight's values in the dtype of x, brought to its device."""
    return torch.nn.functional.linear(x_TI, weight.dequantise(x_TI.dtype).to(x_TI.device), bias_O)
