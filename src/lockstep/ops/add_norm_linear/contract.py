"""Contract of add_norm_linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from lockstep.ops.add_norm_linear.reference import add_norm_linear
from lockstep.ops.cases import DTYPES, normal, product_scale, strided
from lockstep.ops.contract import Argument, Case, Contract, Signature, Workload, rounded

_Arguments = tuple[Any, ...]
_Result = tuple[torch.Tensor, torch.Tensor]

_SHAPES = (
    (1, 64, 96),
    (1, 1100, 40),
    (5, 576, 192),
    (8, 100, 66),
    (17, 320, 64),
    (40, 96, 64),
    (150, 328, 144),
    (0, 64, 64),
)
"""Rows, inputs, outputs of the weight."""

_SPREAD = 0.4
"""Of the products: of all cases none reaches 2.5, six times as much."""

_MOST_SUMMED = 1100


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape, gated in product(_SHAPES, (False, True)):
            yield _case(shape, dtype, gated=gated)
        yield _case((3, 320, 64), dtype, adds=False)
        yield _case((40, 320, 64), dtype, adds=False, gated=True)
        yield _case((3, 320, 64), dtype, has_bias=True)
        yield _case((1, 16384, 48), dtype)
        for size in (0.0, 1e-3, 1e3):
            yield _case((1, 320, 64), dtype, has_bias=True, size=size)
        yield _case((1, 320, 64), dtype, has_bias=True, gated=True)
        if dtype != torch.float32:
            yield _case((2, 320, 64), dtype, norm_dtype=torch.float32)


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    norm_dtype: torch.dtype | None = None,
    adds: bool = True,
    has_bias: bool = False,
    gated: bool = False,
    size: float = 1.0,
) -> Case:
    rows, inputs, outputs = shape

    def make(g: torch.Generator) -> _Arguments:
        update, residual = (strided(normal(g, rows, inputs, dtype=dtype, scale=size)) for _ in range(2))
        norm_weight = normal(g, inputs, dtype=norm_dtype or dtype, scale=0.1) + 1
        weight = normal(g, outputs, inputs, dtype=dtype, scale=_SPREAD * product_scale(inputs, _MOST_SUMMED))
        bias = normal(g, outputs, dtype=dtype, scale=0.1) if has_bias else None
        return update if adds else None, residual, norm_weight, 1e-6, weight, bias, gated

    flags = {"no update": not adds, "bias": has_bias, "gated": gated, "float32 norm": norm_dtype is not None}
    told = "".join(f", {name}" for name, is_so in flags.items() if is_so) + f", size {size:g}" * (size != 1)
    signature: Signature = {
        "dtype": dtype,
        "weight_dtype": norm_dtype or dtype,
        "inputs": inputs,
        "outputs": outputs,
        "bias": has_bias,
        "gated": gated,
        "adds": adds,
    }
    return Case(f"{dtype} {rows}x{inputs}x{outputs}{told}", signature, make)


def _changed(at: int, change: Callable[[Any], Any]) -> Callable[..., _Result]:
    """The reference over arguments of which one is changed."""

    def wrong(*given: Any) -> _Result:
        changed = [*given[:at], change(given[at]), *given[at + 1 :]]
        return add_norm_linear(*changed)

    return wrong


def _stream_not_updated(*given: Any) -> _Result:
    return add_norm_linear(*given)[0], given[1]


def _not_normalised(*given: Any) -> _Result:
    # A weight of the norm that undoes most of what it does to rows of size sqrt(2).
    changed = [*given[:2], given[2] * 1.4, *given[3:]]
    return add_norm_linear(*changed)


def _one_input_short(*given: Any) -> _Result:
    weight = given[4].clone()
    weight[:, -1] = 0
    changed = [*given[:4], weight, *given[5:]]
    return add_norm_linear(*changed)


def _gate_and_up_swapped(*given: Any) -> _Result:
    changed = [*given[:4], given[4].roll(given[4].shape[0] // 2, 0), *given[5:]]
    return add_norm_linear(*changed)


def _timed(rows: int) -> Case:
    return _case((rows, 4096, 2 * 12288), torch.bfloat16, gated=True)


def _flops(update: torch.Tensor | None, residual: torch.Tensor, *given: Any) -> int:
    return 2 * residual.shape[0] * int(given[2].numel())


CONTRACT = Contract(
    name="add_norm_linear",
    summary="total = residual + update; rms_norm(total) @ weight^T + bias, silu(gate) * up of it, and total",
    arguments=(
        Argument("update", ("row", "input"), note="None to normalise the stream as it is"),
        Argument("residual", ("row", "input"), scratch=True, note="may be overwritten with the sum"),
        Argument("norm_weight", ("input",), note="in the dtype of the residual, or in float32"),
        Argument("eps"),
        Argument("weight", ("output", "input"), constant=True),
        Argument("bias", ("output",), note="optional"),
        Argument("gated", note="the outputs are gate, then up: the result is silu(gate) * up"),
    ),
    returns=("out[row, output, or half of them]", "total[row, input]"),
    rounding=(
        "the sum to the dtype; normalised rows may be rounded to it before the product, scaled or not yet, and the "
        "product before its gate; one rounding at the end"
    ),
    signature=("dtype", "weight_dtype", "inputs", "outputs", "bias", "gated", "adds"),
    reference=add_norm_linear,
    cases=_cases,
    # A product is a sum of terms, each off by up to a unit of itself on its own: the errors have a spread of 0.4 units
    # times what evenly spread roundings have, 0.4 again, and six sigmas of that are one unit. Gate and up stay below
    # 2.5 and multiply what the other is off by: 5 units. Relative to the result are the roundings of the stream, of
    # both products (of which silu makes more, the larger the gate is) and of the result.
    tolerance=rounded(6, maths=64, absolute=2.0**-18, inside=5.0),
    mutants={
        "residual added twice": _changed(1, lambda residual: 2 * residual),
        "stream not updated": _stream_not_updated,
        "norm too large": _not_normalised,
        "ten times eps": _changed(3, lambda eps: 10 * eps),
        "one input short": _one_input_short,
        "gate and up swapped": _gate_and_up_swapped,
        "bias added twice": _changed(5, lambda bias: bias if bias is None else bias + bias.sign()),
    },
    workload=Workload(
        "rows times a gated 24576 x 4096 weight, bfloat16", (1, 4, 8, 64), _timed, num_flops=_flops
    ),
    parts=("rms_norm", "add_rms_norm", "linear", "silu_and_mul"),
)
