"""Contract of add_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, rounded

_Result = tuple[torch.Tensor, torch.Tensor]


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in ((1, 64), (7, 577), (0, 64)):

            def make(
                g: torch.Generator, rows: int = rows, width: int = width, dtype: torch.dtype = dtype
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
                update, residual = (normal(g, rows, width, dtype=dtype) for _ in range(2))
                return update, residual, normal(g, width, dtype=dtype) + 1, 1e-5

            yield Case(f"{dtype} {rows}x{width}", {"dtype": dtype, "width": width}, make)


def _residual_twice(update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> _Result:
    return add_rms_norm(update, 2 * residual, weight, eps)


def _residual_not_updated(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> _Result:
    return add_rms_norm(update, residual, weight, eps)[0], residual


CONTRACT = Contract(
    name="add_rms_norm",
    summary="total = residual + update; rms_norm(total) and total",
    arguments=(
        Argument("update", ("row", "width")),
        Argument("residual", ("row", "width"), scratch=True, note="may be overwritten with the sum"),
        Argument("weight", ("width",)),
        Argument("eps"),
    ),
    returns=("out[row, width]", "total[row, width]"),
    rounding="the sum to the dtype, then the norm as rms_norm",
    signature=("dtype", "width"),
    reference=add_rms_norm,
    cases=_cases,
    # Two roundings, of the sum and of the norm; in between as rms_norm.
    tolerance=rounded(2, maths=16),
    mutants={"residual added twice": _residual_twice, "residual not updated": _residual_not_updated},
)
