"""Contract of layer_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.layer_norm.reference import layer_norm

_Arguments = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]

_OFFSET = 4.0
"""Distance of the mean from zero in standard deviations: far enough that mean(x^2) - mean(x)^2 would lose digits."""

_SHAPES = (
    ((1, 64), 1.0),
    ((5, 577), 1.0),
    ((2, 3, 576), 300.0),
    ((0, 64), 1.0),
    ((2, 64), 0.0),
    ((3, 320), 3e-3),
    ((2, 4097), 5e3),
    ((2, 16384), 1.0),
)
_PARAMETERS = ((True, True), (True, False), (False, False))


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for has_weight, has_bias in _PARAMETERS:
            for shape, scale in _SHAPES if has_bias else _SHAPES[:3]:

                def make(
                    g: torch.Generator,
                    shape: tuple[int, ...] = shape,
                    scale: float = scale,
                    dtype: torch.dtype = dtype,
                    has: tuple[bool, bool] = (has_weight, has_bias),
                ) -> _Arguments:
                    x = (normal(g, *shape, dtype=torch.float32) + _OFFSET) * scale
                    return x.to(dtype), *_parameters(g, shape[-1], dtype, *has), 1e-5

                what = " weight" * has_weight + " bias" * has_bias
                yield _case(
                    f"{dtype} {shape} scale {scale}{what}", dtype, shape[-1], (has_weight, has_bias), make
                )

        def some_heads(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            x = normal(g, 5, 7, 128, dtype=dtype)[:, 2:5]
            return x, *_parameters(g, 128, dtype, True, True), 1e-6

        def gaps(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return strided(normal(g, 4, 100, dtype=dtype)), *_parameters(g, 100, dtype, True, True), 1e-6

        yield _case(f"{dtype} slice of heads", dtype, 128, (True, True), some_heads)
        yield _case(f"{dtype} gaps between rows", dtype, 100, (True, True), gaps)


def _case(
    name: str,
    dtype: torch.dtype,
    width: int,
    has: tuple[bool, bool],
    make: Callable[[torch.Generator], _Arguments],
) -> Case:
    return Case(name, {"dtype": dtype, "width": width, "weight": has[0], "bias": has[1]}, make)


def _parameters(
    g: torch.Generator, width: int, dtype: torch.dtype, has_weight: bool, has_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    weight, bias = normal(g, width, dtype=dtype) + 1, normal(g, width, dtype=dtype)
    return weight if has_weight else None, bias if has_bias else None


def _ten_times_eps(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return layer_norm(x, weight, bias, 10 * eps)


def _mean_not_removed(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    one, zero = x.new_ones(()), x.new_zeros(())
    weighted = x.float() * scale * (one if weight is None else weight)
    return (weighted + (zero if bias is None else bias)).to(x.dtype)


def _bias_twice(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return layer_norm(x, weight, bias if bias is None else 2 * bias, eps)


def _unbiased_variance(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    width = x.shape[-1]
    scaled = weight if weight is None else weight.float() * ((width - 1) / width) ** 0.5
    return layer_norm(x, scaled, bias, eps)


def _missing_last_row(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    out = layer_norm(x, weight, bias, eps)
    out[-1:] = 0
    return out


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        x = normal(g, rows, 4096, dtype=torch.bfloat16)
        return x, *_parameters(g, 4096, torch.bfloat16, True, True), 1e-5

    return _case(f"{rows} rows", torch.bfloat16, 4096, (True, True), make)


CONTRACT = Contract(
    name="layer_norm",
    summary="(x - mean) / sqrt(variance + eps) * weight + bias over the last dim",
    arguments=(
        Argument("x", ("row", "width"), note="any number of dims before the last"),
        Argument("weight", ("width",), note="optional, in the dtype of x"),
        Argument("bias", ("width",), note="optional, in the dtype of x"),
        Argument("eps"),
    ),
    returns=("out[row, width]",),
    rounding="float32 inside, one rounding to the dtype of x",
    signature=("dtype", "width", "weight", "bias"),
    reference=layer_norm,
    cases=_cases,
    # As rms_norm, and what cancels: a mean of 4 standard deviations is off by up to 20 units of one, 4 for each of the
    # last four additions of its sum, whose results are nearly as large, and for the quotient (16.4 in 40,000 rows);
    # values of up to 5.5 are multiplied by weights of up to 5.5 and meet a bias of up to 5.5, 36 in all, whose rounding
    # is one unit of it. With the weight: 5.5 * 20 + 36.
    tolerance=rounded(1, maths=16, absolute=146 * FLOAT32_UNIT),
    mutants={
        "ten times eps": _ten_times_eps,
        "mean not removed": _mean_not_removed,
        "bias added twice": _bias_twice,
        "variance over one less": _unbiased_variance,
        "missing last row": _missing_last_row,
    },
    workload=Workload("rows of 4096 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed),
)
