"""Contract of quant_linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Workload, rounded
from lockstep.ops.grouped_weight import GroupedWeight
from lockstep.ops.quant_linear.reference import quant_linear

_SHAPES = ((1, 64, 96), (5, 576, 160), (17, 1536, 48), (40, 96, 33), (3, 48, 17), (0, 64, 64))
_WIDE = (2, 16384, 24)
_KINDS = ((4, False), (4, True), (8, False), (8, True))
_BLOCK = 32
_LARGEST_INPUT = 3**0.5


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for number, shape in enumerate(_SHAPES):
            for bits, has_minimum in _KINDS:
                group_inputs = 16 if shape[1] % _BLOCK or (number + bits // 4 + has_minimum) % 3 == 0 else 32
                has_bias = (number + has_minimum) % 2 == 0
                yield _case(dtype, shape, bits, has_minimum, group_inputs, has_bias)
        yield _case(dtype, _WIDE, 4, False, 32, False)
        yield _case(dtype, _SHAPES[1], 4, True, 32, True, is_strided=True)
        yield _case(dtype, _SHAPES[0], 8, True, 32, True, size=0.0)
        yield _case(dtype, _SHAPES[0], 4, False, 32, False, size=1024.0)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    bits: int,
    has_minimum: bool,
    group_inputs: int,
    has_bias: bool,
    *,
    size: float = 1.0,
    is_strided: bool = False,
) -> Case:
    """`size` is that of the rows; the weight's scales make products of size one of them again."""
    rows, inputs, outputs = shape

    def make(g: torch.Generator) -> tuple[torch.Tensor, GroupedWeight, torch.Tensor | None]:
        x = ((torch.rand(rows, inputs, generator=g) * 2 - 1) * _LARGEST_INPUT * size).to(dtype)
        weight = _weight(g, outputs, inputs, bits, has_minimum, group_inputs, size or 1.0)
        return strided(x) if is_strided else x, weight, normal(g, outputs, dtype=dtype) if has_bias else None

    kind = f"{bits} bits{' with minima' * has_minimum} by {group_inputs}"
    signature = {"inputs": inputs, "outputs": outputs, "bias": has_bias}
    signature |= {"bits": bits, "group_inputs": group_inputs}
    words = f"{', bias' * has_bias}{', strided' * is_strided}{f', size {size:g}' * (size != 1)}"
    name = f"{dtype} {rows}x{inputs}x{outputs}, {kind}{words}"
    return Case(name, {"dtype": dtype, **signature}, make)


def _weight(
    g: torch.Generator,
    outputs: int,
    inputs: int,
    bits: int,
    has_minimum: bool,
    group_inputs: int,
    input_size: float,
) -> GroupedWeight:
    """Values whose squares, times `input_size` squared, sum to at most about one for each output.

    Scales and minima are values of float16.
    """
    num_codes = 1 << bits
    q = torch.randint(0, num_codes, (outputs, inputs), generator=g, dtype=torch.uint8)
    spread = num_codes / 12**0.5
    shape = (outputs, inputs // group_inputs)
    scale = (torch.rand(shape, generator=g) + 1) / (2 * spread * inputs**0.5 * input_size)
    minimum = None
    if has_minimum:
        # About the middle of the codes, off by up to an eighth of them.
        minimum = (-scale * num_codes * (0.5 + (torch.rand(shape, generator=g) - 0.5) / 4)).half().float()
    return GroupedWeight(q, scale.half().float(), minimum, 0 if has_minimum else num_codes // 2, bits)


def _mutant(change: Callable[[GroupedWeight], GroupedWeight]) -> Callable[..., torch.Tensor]:
    def mutant(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return quant_linear(x, change(weight), bias)

    return mutant


def _without_minimum(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, minimum_OG=None)


def _zero_off_by_one(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, zero=weight.zero + 1)


def _scales_of_the_next_group(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, scale_OG=weight.scale_OG.roll(-1, 1))


def _scales_of_the_next_output(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, scale_OG=weight.scale_OG.roll(-1, 0))


def _scales_transposed(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, scale_OG=weight.scale_OG.T.reshape(weight.scale_OG.shape))


def _halves_of_a_block_swapped(weight: GroupedWeight) -> GroupedWeight:
    whole = weight.shape[1] // _BLOCK * _BLOCK
    q = weight.q_OI.clone()
    q[:, :whole] = q[:, :whole].unflatten(1, (-1, 2, _BLOCK // 2)).flip(2).flatten(1)
    return replace(weight, q_OI=q)


def _last_block_missing(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    x = x.clone()
    x[:, -(x.shape[1] % _BLOCK or _BLOCK) :] = 0
    return quant_linear(x, weight, bias)


def _inputs_in_6_bits(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    step = _LARGEST_INPUT / 31
    return quant_linear((x / step).round() * step, weight, bias)


def _bias_twice(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return quant_linear(x, weight, bias if bias is None else 2 * bias)


# Rounding to 8 bits moves an input by up to half of 1/127 of its block's largest one. As inputs spread evenly, that is
# at most 3^0.5 / 127 * 12^-0.5 = 1/254 as a standard deviation, and of their sum no more, for an output's weights have
# squares that sum to about one. Seven sigmas are accepted; what floats round is far less.
_ROUNDING_TO_8_BITS = 7 / 254


def _timed(rows: int) -> Case:
    return _case(torch.bfloat16, (rows, 4096, 4096), 4, has_minimum=False, group_inputs=32, has_bias=False)


def _num_bytes(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> int:
    return weight.num_bytes + x.nbytes + x.shape[0] * weight.shape[0] * x.element_size()


def _num_flops(x: torch.Tensor, weight: GroupedWeight, *rest: Any) -> int:
    return 2 * x.shape[0] * weight.q_OI.numel()


CONTRACT = Contract(
    name="quant_linear",
    summary="x @ weight^T + bias, the weight in integers with scales",
    arguments=(
        Argument("x", ("row", "input")),
        Argument("weight", ("output", "input"), constant=True, opaque=True, note="a GroupedWeight"),
        Argument("bias", ("output",), note="optional"),
    ),
    returns=("out[row, output]",),
    rounding=(
        "x may be rounded to 8 bits by blocks of 32 inputs, scales and minima to float16; "
        "sums in float32, one rounding to the dtype of x"
    ),
    signature=("dtype", "inputs", "outputs", "bias", "bits", "group_inputs"),
    reference=quant_linear,
    cases=_cases,
    tolerance=rounded(1, maths=4, absolute=_ROUNDING_TO_8_BITS),
    mutants={
        "minimum ignored": _mutant(_without_minimum),
        "zero off by one": _mutant(_zero_off_by_one),
        "scales of the next group": _mutant(_scales_of_the_next_group),
        "scales of the next output": _mutant(_scales_of_the_next_output),
        "scales transposed": _mutant(_scales_transposed),
        "halves of a block swapped": _mutant(_halves_of_a_block_swapped),
        "last block missing": _last_block_missing,
        "inputs in 6 bits": _inputs_in_6_bits,
        "bias added twice": _bias_twice,
    },
    workload=Workload(
        "rows times a 4096 x 4096 weight, 4 bits in blocks of 32",
        (1, 16, 64, 256, 1024),
        _timed,
        num_bytes=_num_bytes,
        num_flops=_num_flops,
    ),
)
