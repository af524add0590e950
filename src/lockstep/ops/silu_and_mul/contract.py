"""Contract of silu_and_mul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lockstep.ops.cases import normal
from lockstep.ops.contract import Argument, Case, Contract, Workload, rounded
from lockstep.ops.silu_and_mul.gates import gated_inputs
from lockstep.ops.silu_and_mul.reference import silu_and_mul


def _cases() -> Iterator[Case]:
    for name, dtype, width, make in gated_inputs():
        yield Case(name, {"dtype": dtype, "width": width}, partial(_arguments, make))


def _arguments(make: Callable[[torch.Generator], torch.Tensor], g: torch.Generator) -> tuple[torch.Tensor]:
    return (make(g),)


def _halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return silu_and_mul(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))


def _other_activation(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate) * up).to(x.dtype)


def _missing_last_row(x: torch.Tensor) -> torch.Tensor:
    out = silu_and_mul(x)
    out[-1:] = 0
    return out


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> tuple[torch.Tensor]:
        return (normal(g, rows, 2 * 8192, dtype=torch.bfloat16),)

    return Case(f"{rows} rows", {"dtype": torch.bfloat16, "width": 8192}, make)


CONTRACT = Contract(
    name="silu_and_mul",
    summary="silu(gate) * up",
    arguments=(Argument("x", ("row", "2 * width"), note="gate, then up; any number of dims before the last"),),
    returns=("out[row, width]",),
    rounding="float32 inside; a kernel may round the activation to the dtype before the product",
    signature=("dtype", "width"),
    reference=silu_and_mul,
    cases=_cases,
    # Two roundings are allowed: of the activation and of the product. exp(-gate) by powers of two rounds
    # gate * log2(e), which moves the result by a unit for each unit of |gate|, and the constant by as much again: 32
    # units for gates of up to 16, and a few for the rest. Beyond -16 the result is below 16 * 16 * 16 * e^-16 and its
    # share of that error below 16 * 2^-25, which is also what is lost where an activation too small for float16's
    # precision is multiplied by up to 16.
    tolerance=rounded(2, maths=40, absolute=16 * 2**-25),
    mutants={
        "halves swapped": _halves_swapped,
        "another activation": _other_activation,
        "missing last row": _missing_last_row,
    },
    workload=Workload("rows of 2 x 8192 bfloat16", (1, 16, 256, 1024, 4096, 16384), _timed),
)
