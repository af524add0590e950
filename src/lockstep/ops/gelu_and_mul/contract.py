"""Contract of gelu_and_mul."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, rounded
from lockstep.ops.gelu_and_mul.reference import gelu_and_mul


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in ((1, 64), (7, 1537), (0, 8)):

            def make(
                g: torch.Generator, rows: int = rows, width: int = width, dtype: torch.dtype = dtype
            ) -> tuple[torch.Tensor]:
                return (normal(g, rows, 2 * width, dtype=dtype, scale=3.0),)

            yield Case(f"{dtype} {rows}x{width}", {"dtype": dtype, "width": width}, make)


def _halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return gelu_and_mul(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))


def _other_activation(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


CONTRACT = Contract(
    name="gelu_and_mul",
    summary="gelu_tanh(gate) * up",
    arguments=(Argument("x", ("row", "2 * width"), note="gate, then up"),),
    returns=("out[row, width]",),
    rounding="float32 inside; a kernel may round the activation to the dtype before the product",
    signature=("dtype", "width"),
    reference=gelu_and_mul,
    cases=_cases,
    # Two roundings are allowed: of the activation and of the product. 1 + tanh cancels for negative gates: what is
    # left is off by a unit of one, times gate and up, each below 16.
    tolerance=rounded(2, maths=8, absolute=16 * 16 * FLOAT32_UNIT),
    mutants={"halves swapped": _halves_swapped, "another activation": _other_activation},
)
