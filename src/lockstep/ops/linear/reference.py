"""Shapes: T rows, I inputs, O outputs."""

from __future__ import annotations

import torch


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias; sums in float32 or wider, one rounding to the dtype of x."""
    if bias_O is not None and x_TI.shape[0] == 1:
        # One row of float16 and a bias were rounded more than once by cuBLAS on an H100, two are not. In bfloat16 some
        # sizes still are: see docs/performance.md.
        return torch.nn.functional.linear(x_TI.expand(2, -1), weight_OI, bias_O)[:1]
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)
