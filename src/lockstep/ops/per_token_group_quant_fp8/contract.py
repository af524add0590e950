"""Contract of per_token_group_quant_fp8, and the cases of every group quantiser."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, strided
from lockstep.ops.contract import Argument, Case, Contract, Signature, Tolerance, Workload
from lockstep.ops.per_token_group_quant_fp8.reference import (
    FP8_MAX,
    SMALLEST_SCALE,
    in_groups,
    per_token_group_quant_fp8,
)

_Arguments = tuple[torch.Tensor, int, bool, bool]
_Result = tuple[torch.Tensor, torch.Tensor]

_EVERY_FORM = ((False, False), (True, False), (False, True), (True, True))
_TWO_FORMS = ((False, False), (True, True))


def uneven(g: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values whose rows, and halves of rows, differ in size: no two groups share a scale."""
    values = torch.randn(*shape, generator=g) * torch.rand(*shape[:-1], 1, generator=g).mul(-9).exp2()
    values[..., shape[-1] // 2 :] *= 0.15
    return (values * scale).to(dtype)


def halfway(g: torch.Generator, rows: int, width: int, limit: float, dtype: torch.dtype) -> torch.Tensor:
    """8.5 to 15.5 of either sign, halfway between two codes for the scale 1, which the last column sees to."""
    odd = 2 * torch.randint(8, 16, (rows, width), generator=g) + 1
    signs = 2 * torch.randint(0, 2, (rows, width), generator=g) - 1
    values = odd * signs / 2
    values[:, -1] = limit
    return values.to(dtype)


def group_cases(limit: float) -> Iterator[Case]:
    """Calls of (x, group, column_major, ue8m0) for codes up to `limit`."""
    for dtype in DTYPES:
        for shape, group, scale, forms in (
            ((1, 128), 128, 1.0, _TWO_FORMS),
            ((5, 896), 128, 1.0, _EVERY_FORM),
            ((33, 192), 64, 1.0, _EVERY_FORM),
            ((2, 3, 512), 128, 1.0, _EVERY_FORM),
            ((3, 16384), 128, 1.0, _TWO_FORMS),
            ((9, 256), 64, 1e4, _TWO_FORMS),
            ((9, 256), 64, 1e-6, _TWO_FORMS),
            ((4, 256), 128, 0.0, _EVERY_FORM),
            ((0, 256), 128, 1.0, _EVERY_FORM),
            ((7, 577), 577, 1.0, _TWO_FORMS),
        ):
            for form in forms:
                yield _case(dtype, shape, group, scale, form)
        for view in ("strided", "transposed"):
            for form in _TWO_FORMS:
                yield _case(dtype, (6, 384), 128, 1.0, form, view)

        def ties(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return halfway(g, 4, 128, limit, dtype), 128, False, False

        yield Case(f"{dtype} halfway between codes", _signature(dtype, 128, 128, (False, False)), ties)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    group: int,
    scale: float,
    form: tuple[bool, bool],
    view: str = "",
) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        x = uneven(g, *shape, dtype=dtype, scale=scale)
        if view == "strided":
            x = strided(x)
        elif view == "transposed":
            x = x.T.contiguous().T
        return x, group, *form

    layout = f"{'columns' if form[0] else 'rows'}{' ue8m0' if form[1] else ''}"
    name = f"{dtype} {'x'.join(map(str, shape))} scale {scale:g} group {group} {layout} {view}".rstrip()
    return Case(name, _signature(dtype, shape[-1], group, form), make)


def _signature(dtype: torch.dtype, width: int, group: int, form: tuple[bool, bool]) -> Signature:
    column_major, ue8m0 = form
    return {"dtype": dtype, "width": width, "group": group, "column_major": column_major, "ue8m0": ue8m0}


def _scale_of_the_previous_row(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, group, column_major, ue8m0)
    return codes, scale.roll(1, 0)


def _scales_transposed(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, group, column_major, ue8m0)
    return codes, scale.transpose(0, -1).reshape(scale.shape)


def _whole_rows_for_groups(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, x.shape[-1], column_major, ue8m0)
    return codes, scale.expand(*x.shape[:-1], x.shape[-1] // group)


def _truncated(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, group, column_major, ue8m0)
    exact = in_groups(x, group).float() * scale.reciprocal()[..., None]
    # One code less, in magnitude, where rounding went away from zero.
    too_far = codes.float().abs() > exact.flatten(-2).abs()
    return (codes.view(torch.uint8) - too_far.to(torch.uint8)).view(torch.float8_e4m3fn), scale


def _halves_away_from_zero(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, group, column_major, ue8m0)
    exact = (in_groups(x, group).float() * scale.reciprocal()[..., None]).flatten(-2).abs()
    further = (codes.view(torch.uint8) + 1).view(torch.float8_e4m3fn)
    tied = further.float().abs() - exact == exact - codes.float().abs()
    return (codes.view(torch.uint8) + tied.to(torch.uint8)).view(torch.float8_e4m3fn), scale


def _without_a_smallest_scale(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    _, scale = per_token_group_quant_fp8(x, group, column_major, ue8m0)
    scale = torch.where(scale == SMALLEST_SCALE, 0.0, scale)
    codes = in_groups(x, group).float() * scale.reciprocal()[..., None]
    return codes.to(torch.float8_e4m3fn).flatten(-2), scale


def _powers_of_two_rounded_down(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    codes, scale = per_token_group_quant_fp8(x, group, column_major, False)
    if not ue8m0:
        return codes, scale
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scaled = in_groups(x, group).float() / scale[..., None]
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).flatten(-2), scale


def _powers_of_two_forgotten(x: torch.Tensor, group: int, column_major: bool, ue8m0: bool) -> _Result:
    return per_token_group_quant_fp8(x, group, column_major, False)


def timed_groups(rows: int) -> Case:
    """The call of a prefill or decode step before a product in blocks of 128."""
    return _case(torch.bfloat16, (rows, 4096), 128, 1.0, (True, False))


CONTRACT = Contract(
    name="per_token_group_quant_fp8",
    summary="each row in groups of e4m3 codes, one scale a group",
    arguments=(
        Argument("x", ("row", "width")),
        Argument("group", note="elements that share a scale; divides the width"),
        Argument(
            "column_major", note="neighbouring rows' scales side by side, columns 16 bytes apart or a multiple"
        ),
        Argument("ue8m0", note="scales are powers of two, still in float32"),
    ),
    returns=("codes[row, width]", "scale[row, width / group]"),
    rounding="scale = largest / 448 and its reciprocal once each to float32; their product with x to float32, to e4m3",
    signature=("dtype", "width", "group", "column_major", "ue8m0"),
    reference=per_token_group_quant_fp8,
    cases=lambda: group_cases(FP8_MAX),
    # Every rounding is that of IEEE 754: nothing is left to the kernel.
    tolerance={torch.float8_e4m3fn: Tolerance(0, 0)},
    mutants={
        "scale of the previous row": _scale_of_the_previous_row,
        "scales transposed": _scales_transposed,
        "whole rows for groups": _whole_rows_for_groups,
        "truncated": _truncated,
        "halves away from zero": _halves_away_from_zero,
        "without a smallest scale": _without_a_smallest_scale,
        "powers of two rounded down": _powers_of_two_rounded_down,
        "powers of two forgotten": _powers_of_two_forgotten,
    },
    workload=Workload(
        "rows of 4096 bfloat16 in groups of 128, column-major scales",
        (1, 16, 256, 2048, 8192, 32768),
        timed_groups,
    ),
)
