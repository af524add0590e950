"""Contract of argmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.argmax.reference import argmax
from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload

_Arguments = tuple[torch.Tensor]
_Found = tuple[torch.Tensor, torch.Tensor]

_SHAPES = ((1, 1), (5, 64), (24, 1001), (0, 64), (300, 33), (2, 40007))


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, vocab_size in _SHAPES:

            def wide(
                g: torch.Generator, shape: tuple[int, int] = (rows, vocab_size), dtype: torch.dtype = dtype
            ) -> _Arguments:
                return (normal(g, *shape, dtype=dtype, scale=4.0),)

            def equals(
                g: torch.Generator, shape: tuple[int, int] = (rows, vocab_size), dtype: torch.dtype = dtype
            ) -> _Arguments:
                return (strided(-normal(g, *shape, dtype=dtype).abs().round()),)

            signature = {"dtype": dtype, "vocab_size": vocab_size}
            yield Case(f"{dtype} {rows}x{vocab_size}", signature, wide)
            yield Case(f"{dtype} {rows}x{vocab_size}, many equal, negative and zero", signature, equals)

        def forbidden(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            logits = torch.full((3, 20000), -torch.inf, dtype=dtype)
            logits[1, 12345] = torch.finfo(dtype).min
            logits[2, 19999] = torch.inf
            return (logits,)

        def zeros(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            return (torch.zeros(3, 1001, dtype=dtype),)

        yield Case(f"{dtype} all zero", {"dtype": dtype, "vocab_size": 1001}, zeros)
        yield Case(f"{dtype} infinite", {"dtype": dtype, "vocab_size": 20000}, forbidden)


def _last_of_equals(logits: torch.Tensor) -> _Found:
    best, at = argmax(logits.flip(-1))
    return best, logits.shape[-1] - 1 - at


def _without_the_last_column(logits: torch.Tensor) -> _Found:
    return argmax(logits[:, : max(logits.shape[-1] - 1, 1)])


def _without_signs(logits: torch.Tensor) -> _Found:
    at = argmax(logits.abs())[1]
    return logits.gather(-1, at[:, None]).flatten(), at


def _of_the_next_row(logits: torch.Tensor) -> _Found:
    return argmax(logits.roll(-1, 0))


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        return (normal(g, rows, 151936, dtype=torch.bfloat16),)

    return Case(f"{rows} rows", {"dtype": torch.bfloat16, "vocab_size": 151936}, make)


CONTRACT = Contract(
    name="argmax",
    summary="the largest value of each row and where it is",
    arguments=(Argument("logits", ("row", "vocab"), note="the first of equal values wins; NaN is above all"),),
    returns=("best[row]", "token_id[row]"),
    rounding="none",
    signature=("dtype", "vocab_size"),
    reference=argmax,
    cases=_cases,
    tolerance={dtype: Tolerance(0, 0) for dtype in (*DTYPES, torch.int64)},
    mutants={
        "last of equals": _last_of_equals,
        "without the last column": _without_the_last_column,
        "without signs": _without_signs,
        "of the next row": _of_the_next_row,
    },
    workload=Workload("rows of 151936 bfloat16 logits", (1, 16, 64, 256), _timed),
)
