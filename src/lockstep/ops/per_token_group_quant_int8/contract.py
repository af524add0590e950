"""Contract of per_token_group_quant_int8."""

from __future__ import annotations

import torch

from lockstep.ops.contract import Argument, Contract, Tolerance, Workload
from lockstep.ops.per_token_group_quant_fp8.contract import group_cases, timed_groups
from lockstep.ops.per_token_group_quant_fp8.reference import SMALLEST_SCALE, in_groups
from lockstep.ops.per_token_group_quant_int8.reference import INT8_MAX, per_token_group_quant_int8

_Result = tuple[torch.Tensor, torch.Tensor]


def _scaled(x: torch.Tensor, group: int, scale: torch.Tensor) -> torch.Tensor:
    return (in_groups(x, group).float() * scale.reciprocal()[..., None]).flatten(-2)


def _scale_of_the_previous_row(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_int8(x, group, column_major, ue8m0)
    return codes, scale.roll(1, 0)


def _whole_rows_for_groups(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_int8(x, x.shape[-1], column_major, ue8m0)
    return codes, scale.expand(*x.shape[:-1], x.shape[-1] // group)


def _truncated(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    _, scale = per_token_group_quant_int8(x, group, column_major, ue8m0)
    return _scaled(x, group, scale).trunc().to(torch.int8), scale


def _halves_away_from_zero(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    _, scale = per_token_group_quant_int8(x, group, column_major, ue8m0)
    scaled = _scaled(x, group, scale)
    return (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8), scale


def _wrapped_around(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    """Codes up to 128, which wrap to -128."""
    _, scale = per_token_group_quant_int8(x, group, column_major, ue8m0)
    scale = torch.where(scale == SMALLEST_SCALE, scale, scale * (INT8_MAX / 128))
    return _scaled(x, group, scale).round().to(torch.int16).to(torch.int8), scale


def _no_smallest_scale(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_int8(x, group, column_major, ue8m0)
    return codes, torch.where(scale == SMALLEST_SCALE, 0.0, scale)


def _powers_of_two_forgotten(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    return per_token_group_quant_int8(x, group, column_major, False)


CONTRACT = Contract(
    name="per_token_group_quant_int8",
    summary="each row in groups of int8 codes, one scale a group",
    arguments=(
        Argument("x", ("row", "width")),
        Argument("group", note="elements that share a scale; divides the width"),
        Argument(
            "column_major", note="neighbouring rows' scales side by side, columns 16 bytes apart or a multiple"
        ),
        Argument("ue8m0", note="scales are powers of two, still in float32"),
    ),
    returns=("codes[row, width]", "scale[row, width / group]"),
    rounding="scale = largest / 127 and its reciprocal once each to float32; their product with x to float32, to int8",
    signature=("dtype", "width", "group", "column_major", "ue8m0"),
    reference=per_token_group_quant_int8,
    cases=lambda: group_cases(INT8_MAX),
    # Every rounding is that of IEEE 754: nothing is left to the kernel.
    tolerance={torch.int8: Tolerance(0, 0)},
    mutants={
        "scale of the previous row": _scale_of_the_previous_row,
        "whole rows for groups": _whole_rows_for_groups,
        "truncated": _truncated,
        "halves away from zero": _halves_away_from_zero,
        "wrapped around": _wrapped_around,
        "no smallest scale": _no_smallest_scale,
        "powers of two forgotten": _powers_of_two_forgotten,
    },
    workload=Workload(
        "rows of 4096 bfloat16 in groups of 128, column-major scales",
        (1, 16, 256, 2048, 8192, 32768),
        timed_groups,
    ),
)
