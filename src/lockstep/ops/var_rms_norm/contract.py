"""Contract of var_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Workload, rounded
from lockstep.ops.var_rms_norm.reference import var_rms_norm

_SHAPES = (
    ((1, 64), 64, 1.0),
    ((1, 128), 1, 1.0),
    ((5, 577), 300, 1.0),
    ((0, 64), 32, 1.0),
    ((2, 64), 48, 0.0),
    ((3, 320), 256, 3e-3),
    ((2, 3, 576), 512, 1.0),
    ((2, 4097), 4096, 1e4),
    ((2, 16384), 12288, 1.0),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for weight_dtype in dict.fromkeys((dtype, torch.float32)):
            for shape, var_hidden_size, scale in _SHAPES:

                def make(
                    g: torch.Generator,
                    shape: tuple[int, ...] = shape,
                    var_hidden_size: int = var_hidden_size,
                    scale: float = scale,
                    dtypes: tuple[torch.dtype, torch.dtype] = (dtype, weight_dtype),
                ) -> tuple[torch.Tensor, torch.Tensor, float, int]:
                    x = strided(normal(g, *shape, dtype=dtypes[0], scale=scale))
                    return x, normal(g, shape[-1], dtype=dtypes[1]) + 1, 1e-5, var_hidden_size

                yield Case(
                    f"{dtype}, weight {weight_dtype}, {shape}, {var_hidden_size} measured, scale {scale}",
                    {"dtype": dtype, "width": shape[-1], "weight_dtype": weight_dtype},
                    make,
                )


def _ten_times_eps(x: torch.Tensor, weight: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    return var_rms_norm(x, weight, 10 * eps, var_hidden_size)


def _all_measured(x: torch.Tensor, weight: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    return var_rms_norm(x, weight, eps, x.shape[-1])


def _mean_over_all(x: torch.Tensor, weight: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    kept = x.float().clone()
    kept[..., var_hidden_size:] = 0
    scale = torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale * weight.float()).to(x.dtype)


def _rest_dropped(x: torch.Tensor, weight: torch.Tensor, eps: float, var_hidden_size: int) -> torch.Tensor:
    out = var_rms_norm(x, weight, eps, var_hidden_size)
    out[..., var_hidden_size:] = 0
    return out


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        x = normal(g, rows, 4096, dtype=torch.bfloat16)
        return x, normal(g, 4096, dtype=torch.bfloat16) + 1, 1e-6, 3072

    signature = {"dtype": torch.bfloat16, "width": 4096, "weight_dtype": torch.bfloat16}
    return Case(f"{rows} rows", signature, make)


CONTRACT = Contract(
    name="var_rms_norm",
    summary="x / sqrt(mean(x[:var_hidden_size]^2) + eps) * weight over the last dim",
    arguments=(
        Argument("x", ("row", "width"), note="any number of dims before the last"),
        Argument("weight", ("width",), note="in the dtype of x, or in float32"),
        Argument("eps"),
        Argument("var_hidden_size", note="elements of a row that are measured, from its first"),
    ),
    returns=("out[row, width]",),
    rounding="float32 inside, one rounding to the dtype of x",
    signature=("dtype", "width", "weight_dtype"),
    reference=var_rms_norm,
    cases=_cases,
    # As rms_norm.
    tolerance=rounded(1, maths=16),
    mutants={
        "ten times eps": _ten_times_eps,
        "everything measured": _all_measured,
        "mean over the whole row": _mean_over_all,
        "the rest dropped": _rest_dropped,
    },
    workload=Workload("rows of 4096 bfloat16, 3072 measured", (1, 16, 256, 2048, 8192, 32768), _timed),
)
