"""Contract of scaled_mm_fp8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, product_scale
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Tolerance, Workload, rounded
from lockstep.ops.scaled_mm_fp8.reference import BLOCK, scaled_mm_fp8

_SHAPES = ((1, 128, 96), (5, 576, 300), (17, 1536, 384), (150, 100, 33), (70, 512, 272), (0, 128, 64))
_MOST_INPUTS = 1536
_CODES = 64.0
"""Standard deviation of the codes: four of them stay below 448."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for number, shape in enumerate(_SHAPES):
            for scaling in ("tensor", "row", "block"):
                yield _case(dtype, shape, scaling, has_bias=(number + len(scaling)) % 2 == 0)
        yield _case(dtype, (129, 144, 8256), "block", has_bias=True)
        yield _case(dtype, (2, 16384, 48), "block", has_bias=False)
        yield _case(dtype, (2, 16384, 48), "row", has_bias=True)
        yield _case(dtype, (3, 320, 64), "row", has_bias=True, size=0.0)
        for scaling in ("row", "block"):
            yield _case(dtype, (17, 256, 304), scaling, has_bias=False, sliced=True)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    scaling: str,
    has_bias: bool,
    sliced: bool = False,
    size: float = 1.0,
) -> Case:
    """`size` is that of the codes of `a`, in standard deviations of what they can hold."""
    rows, inputs, outputs = shape

    def make(g: torch.Generator) -> tuple[Any, ...]:
        a = _codes(g, rows, inputs, sliced, size)
        b = _codes(g, outputs, inputs, sliced)
        blocks = -(-inputs // BLOCK)
        a_shape, b_shape = {
            "tensor": ((1, 1), (1, 1)),
            "row": ((rows, 1), (outputs, 1)),
            "block": ((rows, blocks), (-(-outputs // BLOCK), blocks)),
        }[scaling]
        a_scale = _scales(g, a_shape, 1 / _CODES)
        if sliced:
            # As column-major quantisers leave them.
            a_scale = a_scale.T.contiguous().T
        bias = normal(g, outputs, dtype=dtype) if has_bias else None
        return a, b, a_scale, _scales(g, b_shape, product_scale(inputs, _MOST_INPUTS) / _CODES), bias, dtype

    words = f"{' bias' * has_bias}{' sliced' * sliced}{f' size {size:g}' * (size != 1)}"
    name = f"{dtype} {rows}x{inputs}x{outputs} per {scaling}{words}"
    signature = {"dtype": dtype, "inputs": inputs, "outputs": outputs, "scaling": scaling, "bias": has_bias}
    return Case(name, signature, make)


def _codes(g: torch.Generator, rows: int, inputs: int, sliced: bool, size: float = 1.0) -> torch.Tensor:
    width = inputs + 64 * sliced
    codes = normal(g, rows, width, dtype=torch.float32, scale=_CODES * size).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn)[:, :inputs]


def _scales(g: torch.Generator, shape: tuple[int, int], size: float) -> torch.Tensor:
    """Between a half and the whole of `size`, so that no result is much larger than one."""
    return (1 + torch.rand(shape, generator=g)) * (size / 2)


def _scales_swapped_end_for_end(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale.flip(0), b_scale.flip(0), bias, dtype)


def _scale_transposed(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale, b_scale.T.reshape(b_scale.shape), bias, dtype)


def _scale_of_the_previous_row(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale.roll(1, 0), b_scale, bias, dtype)


def _scale_of_the_next_block(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale.roll(-1, 1), b_scale, bias, dtype)


def _b_not_scaled(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale, torch.full_like(b_scale, b_scale.mean()), bias, dtype)


def _one_input_short(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    a = a.clone()
    a[:, -1:] = 0
    return scaled_mm_fp8(a, b, a_scale, b_scale, bias, dtype)


def _bias_before_the_scale(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> Any:
    return scaled_mm_fp8(a, b, a_scale, b_scale, bias if bias is None else bias * a_scale.mean(), dtype)


def _tolerances() -> dict[torch.dtype, Tolerance]:
    # float32: as for `linear`, four sigmas of the walk that the roundings of a running sum near one make.
    exact = rounded(1, maths=4, absolute=4 * (_MOST_INPUTS / 2) ** 0.5 * FLOAT32_UNIT)
    # Else the matrix unit may sum fp8 products of a block to 14 bits: in each step of 32, next to the largest, each of
    # them and the sum so far is cut off at 2^-13 of a power of two, up to 16 I^-0.5 (four sigmas times four). A cut
    # loses 0.58 of that unit as a root mean square, 33 of them 16 * 0.58 * 33^0.5 = 53 I^-0.5 of 2^-13. Most steps lose
    # a tenth; where inputs are few, the worst of a million results are those of one such step: 53 * 128^-0.5 = 4.7, of
    # which five sigmas are accepted. (Simulated for 129x144x8256: 0.6 as a root mean square, 13.6 at most.)
    coarse = rounded(1, maths=4, absolute=24 * 2**-13)
    return {torch.float32: exact[torch.float32], **{t: coarse[t] for t in (torch.bfloat16, torch.float16)}}


def _timed(rows: int) -> Case:
    return _case(torch.bfloat16, (rows, 4096, 4096), "block", has_bias=False)


def _flops(a: torch.Tensor, b: torch.Tensor, *rest: Any) -> int:
    return 2 * a.shape[0] * b.numel()


CONTRACT = Contract(
    name="scaled_mm_fp8",
    summary="(a * a_scale) @ (b * b_scale)^T + bias",
    arguments=(
        Argument("a", ("row", "input"), note="e4m3 codes"),
        Argument("b", ("output", "input"), note="e4m3 codes"),
        Argument(
            "a_scale",
            ("row", "block"),
            note="[1, 1] per tensor, [rows, 1] per row, [rows, blocks] per block",
        ),
        Argument(
            "b_scale",
            ("output", "block"),
            note="[1, 1], [outputs, 1] or [outputs / 128, blocks]",
        ),
        Argument("bias", ("output",), note="optional, in dtype"),
        Argument("dtype", note="of the result"),
    ),
    returns=("out[row, output]",),
    rounding="sums of up to 128 products to 14 bits or, for float32 results, as all else in float32; one to dtype",
    signature=("dtype", "inputs", "outputs", "scaling", "bias"),
    reference=scaled_mm_fp8,
    cases=_cases,
    tolerance=_tolerances(),
    mutants={
        "scales end for end": _scales_swapped_end_for_end,
        "scale transposed": _scale_transposed,
        "scale of the previous row": _scale_of_the_previous_row,
        "scale of the next block": _scale_of_the_next_block,
        "b not scaled": _b_not_scaled,
        "one input short": _one_input_short,
        "bias scaled": _bias_before_the_scale,
    },
    workload=Workload(
        "rows times a 4096 x 4096 weight, e4m3 in blocks",
        (1, 16, 64, 256, 1024, 4096),
        _timed,
        num_flops=_flops,
    ),
)
