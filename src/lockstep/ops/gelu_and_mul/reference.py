"""Shapes: T rows, F width of the result."""

from __future__ import annotations

import torch


def gelu_and_mul(x_T2F: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu of the first half times the second half; float32 maths, one rounding at the end.

    gelu(x) = x * P(N(0, 1) <= x), or its approximation by tanh.
    Sources: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    active_TF = torch.nn.functional.gelu(gate_TF, approximate="tanh" if tanh else "none")
    return (active_TF * up_TF).to(x_T2F.dtype)
