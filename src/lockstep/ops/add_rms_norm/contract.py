"""Contract of add_rms_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Workload, rounded

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
_Result = tuple[torch.Tensor, torch.Tensor]

_SHAPES = (
    ((1, 64), 1.0),
    ((7, 577), 1.0),
    ((0, 64), 1.0),
    ((2, 64), 0.0),
    ((3, 320), 3e-3),
    ((2, 3, 576), 300.0),
    ((2, 4097), 5e3),
    ((2, 16384), 1.0),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape, scale in _SHAPES:

            def make(
                g: torch.Generator,
                shape: tuple[int, ...] = shape,
                scale: float = scale,
                dtype: torch.dtype = dtype,
            ) -> _Arguments:
                update, residual = (normal(g, *shape, dtype=dtype, scale=scale) for _ in range(2))
                return update, residual, normal(g, shape[-1], dtype=dtype) + 1, 1e-5

            yield _case(f"{dtype} {shape} scale {scale}", dtype, dtype, shape[-1], make)

        def halves(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            packed = normal(g, 5, 2 * 192, dtype=dtype)
            return packed[:, :192], packed[:, 192:], normal(g, 192, dtype=dtype) + 1, 1e-5

        def gaps(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            update, residual = (normal(g, 4, 3, 100, dtype=dtype) for _ in range(2))
            return strided(update)[:, 1:], strided(residual)[:, :2], normal(g, 100, dtype=dtype) + 1, 1e-5

        def exact_weight(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            update, residual = (normal(g, 3, 640, dtype=dtype) for _ in range(2))
            return update, residual, normal(g, 640, dtype=torch.float32) + 1, 1e-6

        yield _case(f"{dtype} halves of one tensor", dtype, dtype, 192, halves)
        yield _case(f"{dtype} gaps between rows", dtype, dtype, 100, gaps)
        if dtype != torch.float32:
            yield _case(f"{dtype} with a float32 weight", dtype, torch.float32, 640, exact_weight)


def _case(
    name: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    width: int,
    make: Callable[[torch.Generator], _Arguments],
) -> Case:
    return Case(name, {"dtype": dtype, "width": width, "weight_dtype": weight_dtype}, make)


def _residual_twice(update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> _Result:
    return add_rms_norm(update, 2 * residual, weight, eps)


def _residual_not_updated(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> _Result:
    return add_rms_norm(update, residual, weight, eps)[0], residual


def _ten_times_eps(update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> _Result:
    return add_rms_norm(update, residual, weight, 10 * eps)


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        update, residual = (normal(g, rows, 4096, dtype=torch.bfloat16) for _ in range(2))
        return update, residual, normal(g, 4096, dtype=torch.bfloat16) + 1, 1e-6

    return _case(f"{rows} rows", torch.bfloat16, torch.bfloat16, 4096, make)


CONTRACT = Contract(
    name="add_rms_norm",
    summary="total = residual + update; rms_norm(total) and total",
    arguments=(
        Argument("update", ("row", "width")),
        Argument("residual", ("row", "width"), scratch=True, note="may be overwritten with the sum"),
        Argument("weight", ("width",), note="in the dtype of the residual, or in float32"),
        Argument("eps"),
    ),
    returns=("out[row, width]", "total[row, width]"),
    rounding="the sum to the dtype, then the norm as rms_norm",
    signature=("dtype", "width", "weight_dtype"),
    reference=add_rms_norm,
    cases=_cases,
    # Two roundings, of the sum and of the norm; in between as rms_norm. Those of the sum also show in the scale of the
    # norm: up to a third one where rows are narrow, 0.02 of it in rows of 577. The sum itself is rounded once.
    tolerance=rounded(3, maths=16),
    tolerance_of={"total": rounded(1, maths=1)},
    mutants={
        "residual added twice": _residual_twice,
        "residual not updated": _residual_not_updated,
        "ten times eps": _ten_times_eps,
    },
    workload=Workload("rows of 4096 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed),
)
