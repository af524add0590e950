"""Generators shared by the operators' cases."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Values of a normal distribution, drawn in float32 so that every dtype sees the same numbers."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def product_scale(inputs: int, most: int) -> float:
    """Of weights whose products with rows of size one end near one; of more than `most` inputs nearer to zero.

    A running sum of I products that ends near s walks s * sqrt(I / 2) units: beyond `most`, no further than there.
    """
    return inputs**-0.5 * min(1.0, (most / inputs) ** 0.5)


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same values with a row stride larger than the row, as slices of packed products have; NaN in between."""
    wide = torch.full((*values.shape[:-1], values.shape[-1] + 8), torch.nan, dtype=values.dtype)
    view = wide[..., : values.shape[-1]]
    view.copy_(values)
    return view
