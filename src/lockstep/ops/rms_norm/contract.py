"""Contract of rms_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Workload, rounded
from lockstep.ops.rms_norm.reference import rms_norm

_Arguments = tuple[torch.Tensor, torch.Tensor, float]

_SHAPES = (
    (1, 64, 1.0),
    (5, 577, 1.0),
    (3, 576, 300.0),
    (0, 64, 1.0),
    (2, 64, 0.0),
    (3, 320, 3e-3),
    (2, 4097, 1e4),
    (3, 5120, 1.0),
    (2, 16384, 1.0),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width, scale in _SHAPES:

            def make(
                g: torch.Generator,
                rows: int = rows,
                width: int = width,
                scale: float = scale,
                dtype: torch.dtype = dtype,
            ) -> _Arguments:
                return normal(g, rows, width, dtype=dtype, scale=scale), normal(g, width, dtype=dtype) + 1, 1e-5

            yield _case(f"{dtype} {rows}x{width} scale {scale}", dtype, dtype, width, make)

        def heads(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return strided(normal(g, 4, 3, 64, dtype=dtype)), normal(g, 64, dtype=dtype) + 1, 1e-6

        def some_heads(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return normal(g, 5, 7, 128, dtype=dtype)[:, 2:5], normal(g, 128, dtype=dtype) + 1, 1e-6

        def columns(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return normal(g, 96, 5, dtype=dtype).T, normal(g, 96, dtype=dtype) + 1, 1e-6

        def exact_weight(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return normal(g, 3, 640, dtype=dtype), normal(g, 640, dtype=torch.float32) + 1, 1e-6

        yield _case(f"{dtype} strided heads", dtype, dtype, 64, heads)
        yield _case(f"{dtype} strided slice of heads", dtype, dtype, 128, some_heads)
        yield _case(f"{dtype} strided columns", dtype, dtype, 96, columns)
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


def _ten_times_eps(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight, 10 * eps)


def _missing_last_row(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = rms_norm(x, weight, eps)
    out[-1:] = 0
    return out


def _variance_instead(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x - x.float().mean(-1, keepdim=True).to(x.dtype), weight, eps)


def _weight_of_the_next_column(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight.roll(-1), eps)


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        return normal(g, rows, 4096, dtype=torch.bfloat16), normal(g, 4096, dtype=torch.bfloat16) + 1, 1e-6

    return _case(f"{rows} rows", torch.bfloat16, torch.bfloat16, 4096, make)


CONTRACT = Contract(
    name="rms_norm",
    summary="x / sqrt(mean(x^2) + eps) * weight over the last dim",
    arguments=(
        Argument("x", ("row", "width"), note="any number of dims before the last"),
        Argument("weight", ("width",), note="in the dtype of x, or in float32"),
        Argument("eps"),
    ),
    returns=("out[row, width]",),
    rounding="float32 inside, one rounding to the dtype of x",
    signature=("dtype", "width", "weight_dtype"),
    reference=rms_norm,
    cases=_cases,
    # 16384 squares in sixteen or more running sums of up to 1024: the roundings of each walk sqrt(1024) / 3 units of
    # it, independently, so the whole sum is off by a quarter of that, 2.7 units, and its root by 1.3. Four sigmas of
    # it are 5; the mean, the root and two products add at most 8.
    tolerance=rounded(1, maths=16),
    mutants={
        "ten times eps": _ten_times_eps,
        "missing last row": _missing_last_row,
        "mean removed": _variance_instead,
        "weight of the next column": _weight_of_the_next_column,
    },
    workload=Workload("rows of 4096 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed),
)
