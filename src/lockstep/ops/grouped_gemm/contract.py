"""Contract of grouped_gemm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, product_scale, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded
from lockstep.ops.grouped_gemm.reference import grouped_gemm
from lockstep.ops.moe_align.reference import moe_align

# Source rows, experts per row, experts, inputs, outputs, rows of a block.
_SHAPES = (
    (1, 8, 16, 64, 96, 16),
    (5, 2, 4, 96, 33, 16),
    (70, 4, 6, 100, 64, 32),
    (40, 1, 3, 577, 48, 64),
    (9, 2, 5, 64, 160, 1),
    (2, 3, 8, 1024, 16, 16),
    (0, 2, 4, 64, 64, 16),
)

_MOST_SUMMED = 1024


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            for has_row_weights in (False, True):
                yield _case(dtype, shape, has_row_weights)
        yield _case(dtype, (21, 4, 8, 64, 48, 16), True, share_elsewhere=0.5)
        yield _case(dtype, (6, 2, 4, 64, 48, 16), False, share_elsewhere=1.0)
        yield _case(dtype, (6, 2, 4, 64, 48, 16), False, is_strided=True)
        yield _case(dtype, (2, 2, 3, 16384, 24, 16), True)
        yield _case(dtype, (6, 2, 4, 64, 48, 16), True, size=0.0)
        yield _case(dtype, (6, 2, 4, 64, 48, 16), True, size=4096.0)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int],
    has_row_weights: bool,
    *,
    share_elsewhere: float = 0.0,
    is_strided: bool = False,
    size: float = 1.0,
) -> Case:
    """`size` is that of the rows; the weights make products of size one of them again."""
    rows, per_row, experts, inputs, outputs, block_size = shape

    def make(g: torch.Generator) -> tuple[Any, ...]:
        ids = torch.rand(rows, experts, generator=g).argsort(-1)[:, :per_row].to(torch.int32)
        ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < share_elsewhere, -1)
        x = normal(g, rows, inputs, dtype=dtype, scale=size)
        scale = product_scale(inputs, _MOST_SUMMED) / (size or 1.0)
        weight = normal(g, experts, outputs, inputs, dtype=dtype, scale=scale)
        row_weights = torch.rand(rows, per_row, generator=g) if has_row_weights else None
        aligned = moe_align(ids, experts, block_size)
        return strided(x) if is_strided else x, weight, *aligned, row_weights, per_row

    words = f"{' weighted' * has_row_weights}{' strided' * is_strided}{f' size {size:g}' * (size != 1)}"
    name = f"{dtype} {rows} rows, {per_row} of {experts}, {inputs}x{outputs}, blocks of {block_size}"
    return Case(
        f"{name}, {share_elsewhere} elsewhere{words}",
        {"dtype": dtype, "experts": experts, "inputs": inputs, "outputs": outputs, "block_size": block_size},
        make,
    )


def _next_expert(
    x: Any, weight: Any, pairs: Any, experts: Any, num_rows: Any, row_weights: Any, per_row: int
) -> torch.Tensor:
    return grouped_gemm(x, weight.roll(1, 0), pairs, experts, num_rows, row_weights, per_row)


def _one_input_short(x: Any, weight: Any, *rest: Any) -> torch.Tensor:
    return grouped_gemm(x[:, :-1], weight[:, :, :-1], *rest)


def _weights_ignored(
    x: Any, weight: Any, pairs: Any, experts: Any, num_rows: Any, row_weights: Any, per_row: int
) -> torch.Tensor:
    return grouped_gemm(x, weight, pairs, experts, num_rows, None, per_row)


def _weights_of_the_next_pair(
    x: Any, weight: Any, pairs: Any, experts: Any, num_rows: Any, row_weights: Any, per_row: int
) -> torch.Tensor:
    moved = None if row_weights is None else row_weights.flatten().roll(1).view_as(row_weights)
    return grouped_gemm(x, weight, pairs, experts, num_rows, moved, per_row)


def _last_block_missing(
    x: Any, weight: Any, pairs: Any, experts: Any, num_rows: Any, row_weights: Any, per_row: int
) -> torch.Tensor:
    used = experts >= 0
    shortened = experts.masked_fill(used & ~used.roll(-1), -1) if len(experts) > 1 else experts
    return grouped_gemm(x, weight, pairs, shortened, num_rows, row_weights, per_row)


def _row_of_the_pair(
    x: Any, weight: Any, pairs: Any, experts: Any, num_rows: Any, row_weights: Any, per_row: int
) -> torch.Tensor:
    cycled = torch.cat([x] * per_row)
    return grouped_gemm(cycled, weight, pairs, experts, num_rows, row_weights, 1)


def _timed(rows: int) -> Case:
    return _case(torch.bfloat16, (rows, 8, 64, 2048, 1536, 64), False)


def _flops(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> int:
    return 2 * x.shape[0] * rest[-1] * weight[0].numel()


def _moved(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> int:
    """Weights of experts that were chosen are read once, each input row and each result once."""
    block_experts = rest[1]
    num_pairs = x.shape[0] * rest[-1]
    num_read = len(block_experts[block_experts >= 0].unique())
    return x.nbytes + num_read * weight[0].nbytes + num_pairs * weight.shape[1] * x.element_size()


CONTRACT = Contract(
    name="grouped_gemm",
    summary="each pair's row times the weight of its expert, times the pair's weight",
    arguments=(
        Argument("x", ("source", "input")),
        Argument("weight", ("expert", "output", "input"), constant=True),
        Argument("pairs", ("row",), note="int32, of moe_align"),
        Argument("block_experts", ("block",), note="int32, of moe_align"),
        Argument("num_rows", ("1",), note="int32, of moe_align"),
        Argument("row_weights", ("source", "choice"), note="float32, optional"),
        Argument("pairs_per_row", note="pairs of each source row"),
    ),
    returns=("out[pair, output]",),
    rounding="sums in float32 or wider; a kernel may round them to the dtype of x before the row weight",
    signature=("dtype", "experts", "inputs", "outputs", "block_size"),
    reference=grouped_gemm,
    cases=_cases,
    # As linear: a running sum of 1024 products ends near one, its roundings walk sqrt(1024 / 2) units, four sigmas.
    # The product may be rounded before its row weight, which is below one.
    tolerance=rounded(2, maths=4, absolute=4 * (_MOST_SUMMED / 2) ** 0.5 * FLOAT32_UNIT),
    mutants={
        "weight of the next expert": _next_expert,
        "one input short": _one_input_short,
        "row weights ignored": _weights_ignored,
        "weight of the next pair": _weights_of_the_next_pair,
        "last block missing": _last_block_missing,
        "row of the pair's own number": _row_of_the_pair,
    },
    workload=Workload(
        "rows, 8 of 64 experts of 2048 x 1536, bfloat16", (1, 16, 256, 1024, 4096), _timed, _moved, _flops
    ),
)
