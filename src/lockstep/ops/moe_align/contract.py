"""Contract of moe_align."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import strided
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.moe_align.reference import moe_align

_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Tokens, experts per token, experts, rows of a block, share of pairs that belong to other ranks.
_SHAPES = (
    (1, 8, 128, 16, 0.0),
    (1, 1, 1, 1, 0.0),
    (5, 2, 4, 16, 0.0),
    (70, 8, 60, 16, 0.0),
    (33, 4, 16, 64, 0.5),
    (600, 6, 64, 128, 0.0),
    (9, 3, 7, 1, 0.4),
    (2, 2, 300, 32, 0.0),
    (13, 2, 8, 16, 1.0),
    (0, 4, 8, 16, 0.0),
)


def _cases() -> Iterator[Case]:
    for shape in _SHAPES:
        yield _case(shape)
    yield _case((40, 4, 16, 16, 0.0), is_uneven=True)
    yield _case((7, 3, 8, 16, 0.3), is_strided=True)


def _case(
    shape: tuple[int, int, int, int, float], *, is_uneven: bool = False, is_strided: bool = False
) -> Case:
    tokens, top_k, experts, block_size, share_elsewhere = shape

    def make(g: torch.Generator) -> tuple[torch.Tensor, int, int]:
        ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k].to(torch.int32)
        if is_uneven:
            ids = ids % 2 * (experts - 1)
        ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < share_elsewhere, -1)
        return _with_gaps(ids) if is_strided else ids, experts, block_size

    words = f"{' two experts only' * is_uneven}{' strided' * is_strided}"
    return Case(
        f"{tokens} tokens, {top_k} of {experts}, blocks of {block_size}, {share_elsewhere} elsewhere{words}",
        {"dtype": torch.int32, "experts": experts, "top_k": top_k, "block_size": block_size},
        make,
    )


def _with_gaps(ids: torch.Tensor) -> torch.Tensor:
    """The same ids with a row stride larger than the row, and ids that do not exist in between."""
    return strided(ids.float()).nan_to_num(nan=2.0**30).to(torch.int32)


def _padding_forgotten(ids: torch.Tensor, num_experts: int, block_size: int) -> _Result:
    pairs, experts, num_rows = moe_align(ids, num_experts, block_size)
    return pairs.clamp(max=ids.numel() - 1), experts, num_rows


def _descending(ids: torch.Tensor, num_experts: int, block_size: int) -> _Result:
    pairs, experts, num_rows = moe_align(ids.flip(0, 1), num_experts, block_size)
    return torch.where(pairs < ids.numel(), ids.numel() - 1 - pairs, pairs), experts, num_rows


def _others_kept(ids: torch.Tensor, num_experts: int, block_size: int) -> _Result:
    return moe_align(ids.clamp(min=0), num_experts, block_size)


def _one_expert_further(ids: torch.Tensor, num_experts: int, block_size: int) -> _Result:
    pairs, experts, num_rows = moe_align(ids, num_experts, block_size)
    return pairs, torch.where(experts >= 0, (experts + 1) % num_experts, experts), num_rows


def _unpadded_count(ids: torch.Tensor, num_experts: int, block_size: int) -> _Result:
    pairs, experts, _ = moe_align(ids, num_experts, block_size)
    return pairs, experts, (ids >= 0).sum().view(1).to(torch.int32)


def _timed(tokens: int) -> Case:
    return _case((tokens, 8, 128, 64, 0.0))


CONTRACT = Contract(
    name="moe_align",
    summary="token-expert pairs sorted by expert and padded to whole blocks, in static sizes",
    arguments=(
        Argument("ids", ("token", "choice"), note="int32; -1 for experts of other ranks"),
        Argument("num_experts"),
        Argument("block_size", note="rows of a block"),
    ),
    returns=("pairs[row]", "block_experts[block]", "num_rows[1]"),
    rounding="none",
    signature=("dtype", "experts", "top_k", "block_size"),
    reference=moe_align,
    cases=_cases,
    tolerance={torch.int32: Tolerance(0, 0)},
    mutants={
        "padding forgotten": _padding_forgotten,
        "descending within an expert": _descending,
        "pairs of other ranks kept": _others_kept,
        "one expert further": _one_expert_further,
        "rows counted without padding": _unpadded_count,
    },
    workload=Workload("tokens, 8 of 128 experts, blocks of 64", (1, 64, 1024, 8192), _timed),
)
