"""Inputs of the gated activations, for their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided

GatedInput = tuple[str, torch.dtype, int, Callable[[torch.Generator], torch.Tensor]]

_SHAPES = (
    ((1, 64), 3.0),
    ((7, 1537), 3.0),
    ((0, 8), 3.0),
    ((2, 64), 0.0),
    ((2, 3, 577), 3.0),
    ((2, 640), 60.0),
    ((2, 14336), 3.0),
    ((1, 16384), 3.0),
)


def gated_inputs() -> Iterator[GatedInput]:
    """(name, dtype, width, what makes x) with gates of a few spreads; up stays within 16, so that float16 holds out."""
    for dtype in DTYPES:
        for shape, spread in _SHAPES:

            def make(
                g: torch.Generator,
                shape: tuple[int, ...] = shape,
                spread: float = spread,
                dtype: torch.dtype = dtype,
            ) -> torch.Tensor:
                return _packed(g, shape, spread, dtype)

            yield f"{dtype} {shape}, gates spread {spread}", dtype, shape[-1], make

        def gaps(g: torch.Generator, dtype: torch.dtype = dtype) -> torch.Tensor:
            return strided(_packed(g, (5, 100), 3.0, dtype))

        def part(g: torch.Generator, dtype: torch.dtype = dtype) -> torch.Tensor:
            return _packed(g, (4, 6, 96), 3.0, dtype)[:, 1:4]

        def columns(g: torch.Generator, dtype: torch.dtype = dtype) -> torch.Tensor:
            return _packed(g, (3, 33), 3.0, dtype).T.contiguous().T

        yield f"{dtype} gaps between rows", dtype, 100, gaps
        yield f"{dtype} part of three dims", dtype, 96, part
        yield f"{dtype} columns first", dtype, 33, columns


def _packed(g: torch.Generator, shape: tuple[int, ...], spread: float, dtype: torch.dtype) -> torch.Tensor:
    gate = normal(g, *shape, dtype=dtype, scale=spread)
    return torch.cat((gate, normal(g, *shape, dtype=dtype, scale=min(spread, 3.0))), dim=-1)
