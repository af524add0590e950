"""Contract of linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, product_scale, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.linear.reference import linear

_SHAPES = (
    (1, 64, 96),
    (1, 1100, 40),
    (2, 100, 33),
    (5, 576, 960),
    (17, 1536, 576),
    (40, 576, 200),
    (200, 328, 136),
    (300, 100, 33),
    (0, 64, 64),
)
"""Rows, inputs, outputs."""

_MOST_SUMMED = 1536


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            for has_bias in (False, True):
                yield _case(dtype, shape, has_bias)
        yield _case(dtype, (2, 16384, 40), True)
        yield _case(dtype, (5, 320, 64), True, is_strided=True)
        yield _case(dtype, (3, 320, 64), True, size=0.0)
        yield _case(dtype, (3, 320, 64), False, size=4096.0)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    has_bias: bool,
    *,
    size: float = 1.0,
    is_strided: bool = False,
) -> Case:
    """`size` is that of the rows; the weight makes products of size one of them again."""
    rows, inputs, outputs = shape

    def make(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        scale = product_scale(inputs, _MOST_SUMMED) / (size or 1.0)
        weight = normal(g, outputs, inputs, dtype=dtype, scale=scale)
        bias = normal(g, outputs, dtype=dtype) if has_bias else None
        x = normal(g, rows, inputs, dtype=dtype, scale=size)
        return strided(x) if is_strided else x, weight, bias

    words = f"{' bias' * has_bias}{' strided' * is_strided}{f' size {size:g}' * (size != 1)}"
    signature = {"dtype": dtype, "inputs": inputs, "outputs": outputs, "bias": has_bias}
    return Case(f"{dtype} {rows}x{inputs}x{outputs}{words}", signature, make)


def _one_input_short(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x[:, :-1], weight[:, :-1], bias)


def _bias_twice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, weight, bias if bias is None else 2 * bias)


def _timed(rows: int) -> Case:
    return _case(torch.bfloat16, (rows, 4096, 4096), has_bias=False)


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    return 2 * x.shape[0] * weight.numel()


CONTRACT = Contract(
    name="linear",
    summary="x @ weight^T + bias",
    arguments=(
        Argument("x", ("row", "input")),
        Argument("weight", ("output", "input"), constant=True),
        Argument("bias", ("output",), note="optional"),
    ),
    returns=("out[row, output]",),
    rounding="sums in float32 or wider, one rounding to the dtype of x",
    signature=("dtype", "inputs", "outputs", "bias"),
    reference=linear,
    cases=_cases,
    # A running sum of 1536 products ends near one: its roundings walk sqrt(1536 / 2) units, four sigmas of which are
    # accepted in any order of summing.
    tolerance=rounded(1, maths=4, absolute=4 * (_MOST_SUMMED / 2) ** 0.5 * FLOAT32_UNIT),
    mutants={"one input short": _one_input_short, "bias added twice": _bias_twice},
    workload=Workload(
        "rows times a 4096 x 4096 weight, bfloat16", (1, 16, 64, 256, 1024, 4096), _timed, num_flops=_flops
    ),
)
