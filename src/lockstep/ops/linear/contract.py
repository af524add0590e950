"""Contract of linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.linear.reference import linear

_SHAPES = ((1, 64, 96), (5, 576, 960), (17, 1536, 576), (300, 100, 33), (0, 64, 64))


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, inputs, outputs in _SHAPES:
            for has_bias in (False, True):

                def make(
                    g: torch.Generator,
                    shape: tuple[int, int, int] = (rows, inputs, outputs),
                    has_bias: bool = has_bias,
                    dtype: torch.dtype = dtype,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
                    rows, inputs, outputs = shape
                    weight = normal(g, outputs, inputs, dtype=dtype, scale=inputs**-0.5)
                    bias = normal(g, outputs, dtype=dtype) if has_bias else None
                    return normal(g, rows, inputs, dtype=dtype), weight, bias

                yield Case(
                    f"{dtype} {rows}x{inputs}x{outputs}{' bias' if has_bias else ''}",
                    {"dtype": dtype, "inputs": inputs, "outputs": outputs, "bias": has_bias},
                    make,
                )


def _one_input_short(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x[:, :-1], weight[:, :-1], bias)


def _bias_twice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, weight, bias if bias is None else 2 * bias)


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, None]:
        weight = normal(g, 4096, 4096, dtype=torch.bfloat16, scale=4096**-0.5)
        return normal(g, rows, 4096, dtype=torch.bfloat16), weight, None

    signature = {"dtype": torch.bfloat16, "inputs": 4096, "outputs": 4096, "bias": False}
    return Case(f"{rows} rows", signature, make)


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
    tolerance=rounded(1, maths=4, absolute=4 * (1536 / 2) ** 0.5 * FLOAT32_UNIT),
    mutants={"one input short": _one_input_short, "bias added twice": _bias_twice},
    workload=Workload(
        "rows times a 4096 x 4096 weight, bfloat16", (1, 16, 64, 256, 1024, 4096), _timed, num_flops=_flops
    ),
)
