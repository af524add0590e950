"""Contract of rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, rounded
from lockstep.ops.rms_norm.reference import rms_norm


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width, scale in ((1, 64, 1.0), (5, 577, 1.0), (3, 576, 300.0), (0, 64, 1.0), (2, 64, 0.0)):

            def make(
                g: torch.Generator,
                rows: int = rows,
                width: int = width,
                scale: float = scale,
                dtype: torch.dtype = dtype,
            ) -> tuple[torch.Tensor, torch.Tensor, float]:
                return normal(g, rows, width, dtype=dtype, scale=scale), normal(g, width, dtype=dtype) + 1, 1e-5

            yield Case(f"{dtype} {rows}x{width} scale {scale}", {"dtype": dtype, "width": width}, make)

        def heads(g: torch.Generator, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
            return strided(normal(g, 4, 3, 64, dtype=dtype)), normal(g, 64, dtype=dtype) + 1, 1e-6

        yield Case(f"{dtype} strided heads", {"dtype": dtype, "width": 64}, heads)


def _wrong_eps(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight, eps + 0.05)


def _missing_last_row(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = rms_norm(x, weight, eps)
    out[-1:] = 0
    return out


def _variance_instead(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x - x.float().mean(-1, keepdim=True).to(x.dtype), weight, eps)


CONTRACT = Contract(
    name="rms_norm",
    summary="x / sqrt(mean(x^2) + eps) * weight over the last dim",
    arguments=(Argument("x", ("row", "width")), Argument("weight", ("width",)), Argument("eps")),
    returns=("out[row, width]",),
    rounding="float32 inside, one rounding to the dtype of x",
    signature=("dtype", "width"),
    reference=rms_norm,
    cases=_cases,
    # The sum of squares drifts by about sqrt(577) units over its roundings, half of that after the root; then a few.
    tolerance=rounded(1, maths=16),
    mutants={"wrong eps": _wrong_eps, "missing last row": _missing_last_row, "mean removed": _variance_instead},
)
