"""Shapes: T rows, F width of the result."""

from __future__ import annotations

import torch


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second half; float32 maths, one rounding at the end.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_TF) * up_TF).to(x_T2F.dtype)
