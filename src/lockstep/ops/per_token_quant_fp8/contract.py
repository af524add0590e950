"""Contract of per_token_quant_fp8."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, strided
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.per_token_group_quant_fp8.contract import halfway, uneven
from lockstep.ops.per_token_group_quant_fp8.reference import FP8_MAX, SMALLEST_SCALE
from lockstep.ops.per_token_quant_fp8.reference import per_token_quant_fp8

_Result = tuple[torch.Tensor, torch.Tensor]


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape, scale, view in (
            ((1, 64), 1.0, ""),
            ((7, 577), 1.0, ""),
            ((2, 3, 4096), 1.0, ""),
            ((3, 16384), 1.0, ""),
            ((2, 16381), 1.0, ""),
            ((5, 128), 1e4, ""),
            ((5, 128), 1e-6, ""),
            ((3, 128), 0.0, ""),
            ((0, 128), 1.0, ""),
            ((9, 100), 1.0, "strided"),
            ((9, 100), 1.0, "transposed"),
        ):

            def make(
                g: torch.Generator,
                shape: tuple[int, ...] = shape,
                scale: float = scale,
                view: str = view,
                dtype: torch.dtype = dtype,
            ) -> tuple[torch.Tensor]:
                x = uneven(g, *shape, dtype=dtype, scale=scale)
                return (strided(x) if view == "strided" else x.T.contiguous().T if view == "transposed" else x,)

            name = f"{dtype} {'x'.join(map(str, shape))} scale {scale:g} {view}".rstrip()
            yield Case(name, {"dtype": dtype, "width": shape[-1]}, make)

        def ties(g: torch.Generator, dtype: torch.dtype = dtype) -> tuple[torch.Tensor]:
            return (halfway(g, 4, 96, FP8_MAX, dtype),)

        yield Case(f"{dtype} halfway between codes", {"dtype": dtype, "width": 96}, ties)


def _requantised(x: torch.Tensor, scale: torch.Tensor) -> _Result:
    return (x.float() * scale.reciprocal()).to(torch.float8_e4m3fn), scale


def _scale_of_the_previous_row(x: torch.Tensor) -> _Result:
    codes, scale = per_token_quant_fp8(x)
    return codes, scale.roll(1, 0)


def _one_scale_for_all_rows(x: torch.Tensor) -> _Result:
    _, scale = per_token_quant_fp8(x)
    return _requantised(x, scale.amax().expand_as(scale) if scale.numel() else scale)


def _last_column_not_seen(x: torch.Tensor) -> _Result:
    _, scale = per_token_quant_fp8(x[..., :-1])
    return _requantised(x.clamp(-FP8_MAX * scale, FP8_MAX * scale), scale)


def _truncated(x: torch.Tensor) -> _Result:
    codes, scale = per_token_quant_fp8(x)
    too_far = codes.float().abs() > (x.float() * scale.reciprocal()).abs()
    return (codes.view(torch.uint8) - too_far.to(torch.uint8)).view(torch.float8_e4m3fn), scale


def _scale_inverted(x: torch.Tensor) -> _Result:
    codes, scale = per_token_quant_fp8(x)
    return codes, scale.reciprocal()


def _without_a_smallest_scale(x: torch.Tensor) -> _Result:
    _, scale = per_token_quant_fp8(x)
    return _requantised(x, torch.where(scale == SMALLEST_SCALE, 0.0, scale))


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> tuple[torch.Tensor]:
        return (uneven(g, rows, 4096, dtype=torch.bfloat16),)

    return Case(f"{rows} rows", {"dtype": torch.bfloat16, "width": 4096}, make)


CONTRACT = Contract(
    name="per_token_quant_fp8",
    summary="each row in e4m3 codes with one scale",
    arguments=(Argument("x", ("row", "width")),),
    returns=("codes[row, width]", "scale[row, 1]"),
    rounding="scale = largest / 448 and its reciprocal once each to float32; their product with x to float32, to e4m3",
    signature=("dtype", "width"),
    reference=per_token_quant_fp8,
    cases=_cases,
    # Every rounding is that of IEEE 754: nothing is left to the kernel.
    tolerance={torch.float8_e4m3fn: Tolerance(0, 0)},
    mutants={
        "scale of the previous row": _scale_of_the_previous_row,
        "one scale for all rows": _one_scale_for_all_rows,
        "last column not seen": _last_column_not_seen,
        "truncated": _truncated,
        "scale inverted": _scale_inverted,
        "without a smallest scale": _without_a_smallest_scale,
    },
    workload=Workload("rows of 4096 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed),
)
