"""Contract of gelu_and_mul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lockstep.ops.cases import normal
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.gelu_and_mul.reference import gelu_and_mul
from lockstep.ops.silu_and_mul.gates import gated_inputs


def _cases() -> Iterator[Case]:
    for tanh in (True, False):
        for name, dtype, width, make in gated_inputs():
            yield Case(
                f"{name}{' tanh' if tanh else ''}",
                {"dtype": dtype, "width": width, "tanh": tanh},
                partial(_arguments, make, tanh),
            )


def _arguments(
    make: Callable[[torch.Generator], torch.Tensor], tanh: bool, g: torch.Generator
) -> tuple[torch.Tensor, bool]:
    return make(g), tanh


def _halves_swapped(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return gelu_and_mul(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), tanh)


def _other_activation(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _sigmoid_form(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(1.702 * gate) * up).to(x.dtype)


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> tuple[torch.Tensor, bool]:
        return normal(g, rows, 2 * 8192, dtype=torch.bfloat16), True

    return Case(f"{rows} rows", {"dtype": torch.bfloat16, "width": 8192, "tanh": True}, make)


CONTRACT = Contract(
    name="gelu_and_mul",
    summary="gelu(gate) * up, exact or by tanh",
    arguments=(
        Argument("x", ("row", "2 * width"), note="gate, then up; any number of dims before the last"),
        Argument("tanh", note="the approximation by tanh instead of the exact form"),
    ),
    returns=("out[row, width]",),
    rounding="float32 inside; a kernel may round the activation to the dtype before the product",
    signature=("dtype", "width", "tanh"),
    reference=gelu_and_mul,
    cases=_cases,
    # Two roundings are allowed: of the activation and of the product. 1 + tanh and 1 + erf cancel for negative gates:
    # what is left is off by four units of one, times half the gate (beyond 6 nothing is left) and up to 16.
    # Where the tanh form goes by exp, its exponent of up to 32 is off by two units of itself.
    tolerance=rounded(2, maths=72, absolute=4 * 3 * 16 * FLOAT32_UNIT),
    mutants={
        "halves swapped": _halves_swapped,
        "another activation": _other_activation,
        "approximation by a sigmoid": _sigmoid_form,
    },
    workload=Workload("rows of 2 x 8192 bfloat16, by tanh", (1, 16, 256, 1024, 4096, 16384), _timed),
)
