"""Contract of rope."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Signature, Workload, rounded
from lockstep.ops.rope.reference import rope

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype, bool]

_SHAPES = (
    (1, 1, 64, 64),
    (5, 12, 64, 64),
    (3, 4, 128, 64),
    (0, 2, 32, 32),
    (2, 128, 128, 128),
    (2, 3, 80, 80),
    (2, 3, 100, 26),
    (2, 5, 256, 256),
)
"""Tokens, heads, head dim, rotated elements."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for interleaved in (False, True):
            for out_dtype in dict.fromkeys((dtype, torch.float32)):
                for shape in _SHAPES:
                    yield _case(dtype, out_dtype, shape, interleaved)
            for out_dtype in DTYPES if dtype == torch.float32 else ():
                yield _case(dtype, out_dtype, (4, 6, 96, 96), interleaved)
            yield _case(dtype, dtype, (3, 2, 64, 64), interleaved, size=0.0)
            yield _case(dtype, dtype, (3, 2, 64, 64), interleaved, size=1e4)

        def some_heads(g: torch.Generator, dtype: torch.dtype = dtype) -> _Arguments:
            angles = torch.rand(4, 48, generator=g) * 100
            return normal(g, 4, 9, 96, dtype=dtype)[:, 2:7], angles.cos(), angles.sin(), dtype, False

        yield Case(f"{dtype} slice of heads", _signature(dtype, dtype, 96, 96, False), some_heads)


def _case(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    interleaved: bool,
    *,
    size: float = 1.0,
) -> Case:
    """Large values have a zero for the other one of their pair, so that nothing cancels."""
    tokens, heads, head_dim, rotated = shape

    def make(g: torch.Generator) -> _Arguments:
        angles = torch.rand(tokens, rotated // 2, generator=g) * 100
        x = normal(g, tokens, heads, head_dim, dtype=dtype, scale=size)
        if size > 1:
            number = torch.arange(rotated)
            x[..., :rotated] *= number % 2 == 0 if interleaved else number < rotated // 2
        return strided(x), angles.cos(), angles.sin(), out_dtype, interleaved

    words = f"{', interleaved' * interleaved}{f', size {size:g}' * (size != 1)}"
    name = f"{dtype} to {out_dtype} {tokens}x{heads}x{head_dim}, {rotated} rotated{words}"
    return Case(name, _signature(dtype, out_dtype, head_dim, rotated, interleaved), make)


def _signature(
    dtype: torch.dtype, out_dtype: torch.dtype, head_dim: int, rotated: int, interleaved: bool
) -> Signature:
    sizes = {"head_dim": head_dim, "rotated": rotated, "interleaved": interleaved}
    return {"dtype": dtype, "out_dtype": out_dtype, **sizes}


def _other_way(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype, interleaved: bool
) -> torch.Tensor:
    return rope(x, cos, -sin, out_dtype, interleaved)


def _other_pairs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype, interleaved: bool
) -> torch.Tensor:
    return rope(x, cos, sin, out_dtype, not interleaved)


def _angles_of_the_next_token(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype, interleaved: bool
) -> torch.Tensor:
    return rope(x, cos.roll(-1, 0), sin.roll(-1, 0), out_dtype, interleaved)


def _timed(tokens: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        angles = torch.rand(tokens, 64, generator=g) * 100
        return (
            normal(g, tokens, 32, 128, dtype=torch.bfloat16),
            angles.cos(),
            angles.sin(),
            torch.bfloat16,
            False,
        )

    return Case(f"{tokens} tokens", _signature(torch.bfloat16, torch.bfloat16, 128, 128, False), make)


CONTRACT = Contract(
    name="rope",
    summary="rotate pairs of each head's first elements by the token's angles",
    arguments=(
        Argument("x", ("token", "head", "head_dim")),
        Argument("cos", ("token", "rotated / 2"), note="float32"),
        Argument("sin", ("token", "rotated / 2"), note="float32"),
        Argument("out_dtype"),
        Argument("interleaved", note="pairs (2i, 2i + 1) instead of (i, i + rotated / 2)"),
    ),
    returns=("out[token, head, head_dim]",),
    rounding="float32 inside, one rounding to out_dtype",
    signature=("dtype", "out_dtype", "head_dim", "rotated", "interleaved"),
    reference=rope,
    cases=_cases,
    # Two products below 6, each rounded, then their difference: what cancels keeps the products' errors.
    tolerance=rounded(1, maths=2, absolute=2 * 6 * FLOAT32_UNIT),
    mutants={
        "rotated the other way": _other_way,
        "pairs of the other order": _other_pairs,
        "angles of the next token": _angles_of_the_next_token,
    },
    workload=Workload("tokens of 32 heads of 128 bfloat16", (1, 16, 256, 2048, 8192, 32768), _timed),
)
