"""Contract of silu_and_mul."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, rounded
from lockstep.ops.silu_and_mul.reference import silu_and_mul


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in ((1, 64), (7, 1537), (0, 8)):

            def make(
                g: torch.Generator, rows: int = rows, width: int = width, dtype: torch.dtype = dtype
            ) -> tuple[torch.Tensor]:
                return (normal(g, rows, 2 * width, dtype=dtype, scale=3.0),)

            yield Case(f"{dtype} {rows}x{width}", {"dtype": dtype, "width": width}, make)


def _halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return silu_and_mul(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))


def _other_activation(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate) * up).to(x.dtype)


CONTRACT = Contract(
    name="silu_and_mul",
    summary="silu(gate) * up",
    arguments=(Argument("x", ("row", "2 * width"), note="gate, then up"),),
    returns=("out[row, width]",),
    rounding="float32 inside; a kernel may round the activation to the dtype before the product",
    signature=("dtype", "width"),
    reference=silu_and_mul,
    cases=_cases,
    # Two roundings are allowed: of the activation and of the product. exp, sum and quotient are off by a few units;
    # an activation too small for float16's precision is multiplied by up to 16.
    tolerance=rounded(2, maths=8, absolute=16 * 2**-25),
    mutants={"halves swapped": _halves_swapped, "another activation": _other_activation},
)
