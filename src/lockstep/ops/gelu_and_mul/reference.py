"""Shapes: T rows, F width of the result."""

from __future__ import annotations

import torch


def gelu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """gelu (tanh form) of the first half times the second half; float32 maths, one rounding at the end.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate_TF, approximate="tanh") * up_TF).to(x_T2F.dtype)
