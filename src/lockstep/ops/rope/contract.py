"""Contract of rope."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, rounded
from lockstep.ops.rope.reference import rope


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            for tokens, heads, head_dim, rotated in (
                (1, 1, 64, 64),
                (5, 12, 64, 64),
                (3, 4, 128, 64),
                (0, 2, 32, 32),
            ):

                def make(
                    g: torch.Generator,
                    shape: tuple[int, int, int] = (tokens, heads, head_dim),
                    rotated: int = rotated,
                    dtypes: tuple[torch.dtype, torch.dtype] = (dtype, out_dtype),
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]:
                    angles = torch.rand(shape[0], rotated // 2, generator=g) * 100
                    return strided(normal(g, *shape, dtype=dtypes[0])), angles.cos(), angles.sin(), dtypes[1]

                yield Case(
                    f"{dtype} to {out_dtype} {tokens}x{heads}x{head_dim}, {rotated} rotated",
                    {"dtype": dtype, "out_dtype": out_dtype, "head_dim": head_dim, "rotated": rotated},
                    make,
                )


def _other_way(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return rope(x, cos, -sin, out_dtype)


def _interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].float().unflatten(-1, (half, 2))
    a, b, c, s = pairs[..., 0], pairs[..., 1], cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., 2 * half :].float()), dim=-1).to(out_dtype)


CONTRACT = Contract(
    name="rope",
    summary="rotate pairs (i, i + R/2) of each head by the token's angles",
    arguments=(
        Argument("x", ("token", "head", "head_dim")),
        Argument("cos", ("token", "rotated / 2"), note="float32"),
        Argument("sin", ("token", "rotated / 2"), note="float32"),
        Argument("out_dtype"),
    ),
    returns=("out[token, head, head_dim]",),
    rounding="float32 inside, one rounding to out_dtype",
    signature=("dtype", "out_dtype", "head_dim", "rotated"),
    reference=rope,
    cases=_cases,
    # Two products below 6, each rounded, then their difference: what cancels keeps the products' errors.
    tolerance=rounded(1, maths=2, absolute=2 * 6 * FLOAT32_UNIT),
    mutants={"rotated the other way": _other_way, "interleaved pairs": _interleaved},
)
