"""Contract of moe_topk_softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.moe_topk_softmax.reference import moe_topk_softmax

_Arguments = tuple[torch.Tensor, int, bool]
_Result = tuple[torch.Tensor, torch.Tensor]

# Tokens, experts, experts per token, scale of the logits. Few distinct bfloat16 values make many ties at scale 1.
_SHAPES = (
    (1, 128, 8, 3.0),
    (37, 128, 8, 1.0),
    (3, 8, 2, 1.0),
    (5, 60, 4, 3.0),
    (2, 8, 8, 3.0),
    (9, 512, 10, 3.0),
    (4, 7, 1, 1.0),
    (3, 64, 6, 300.0),
    (2, 16, 4, 0.0),
    (0, 64, 4, 1.0),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            for renormalise in (False, True):
                yield _case(dtype, shape, renormalise)
        yield _case(dtype, (6, 64, 4, 3.0), True, is_strided=True)
        yield _crowded_case(dtype)


def _case(
    dtype: torch.dtype, shape: tuple[int, int, int, float], renormalise: bool, *, is_strided: bool = False
) -> Case:
    tokens, experts, top_k, scale = shape

    def make(g: torch.Generator) -> _Arguments:
        logits = normal(g, tokens, experts, dtype=dtype, scale=scale)
        return strided(logits) if is_strided else logits, top_k, renormalise

    words = f"{' renormalised' * renormalise}{' strided' * is_strided}"
    return Case(
        f"{dtype} {tokens} tokens, {top_k} of {experts}, scale {scale}{words}",
        {"dtype": dtype, "experts": experts, "top_k": top_k, "renormalise": renormalise},
        make,
    )


def _crowded_case(dtype: torch.dtype) -> Case:
    """Rows of float32 logits that differ in their last seven bits alone; in 16 bits all of a row are equal."""

    def make(g: torch.Generator) -> _Arguments:
        steps = torch.randint(-48, 48, (20, 128), generator=g)
        sign = torch.tensor([1.0, -1.0]).repeat(10)[:, None]
        return (sign * (4 + steps * 2.0**-21)).to(dtype), 8, True

    return Case(
        f"{dtype} 20 tokens, 8 of 128, crowded",
        {"dtype": dtype, "experts": 128, "top_k": 8, "renormalise": True},
        make,
    )


def _always_renormalised(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    return moe_topk_softmax(logits, top_k, True)


def _never_renormalised(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    return moe_topk_softmax(logits, top_k, False)


def _highest_id_first(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    weights, ids = moe_topk_softmax(logits.flip(-1), top_k, renormalise)
    return weights, logits.shape[1] - 1 - ids


def _missing_last_row(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    weights, ids = moe_topk_softmax(logits, top_k, renormalise)
    weights[-1:] = 0
    return weights, ids


def _last_expert_unseen(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    hidden = logits.index_fill(-1, torch.tensor([logits.shape[1] - 1]), float("-inf"))
    return moe_topk_softmax(hidden, top_k, renormalise)


def _weights_in_half(logits: torch.Tensor, top_k: int, renormalise: bool) -> _Result:
    weights, ids = moe_topk_softmax(logits, top_k, renormalise)
    return weights.to(torch.bfloat16).float(), ids


def _timed(tokens: int) -> Case:
    return _case(torch.float32, (tokens, 128, 8, 3.0), True)


CONTRACT = Contract(
    name="moe_topk_softmax",
    summary="the top_k largest of softmax(logits), and their experts",
    arguments=(
        Argument("logits", ("token", "expert")),
        Argument("top_k", note="experts of each token, at most all"),
        Argument("renormalise", note="divide the chosen weights by their sum"),
    ),
    returns=("weights[token, choice]", "ids[token, choice]"),
    rounding="the choice is exact, ties to the lowest id; float32 inside and float32 weights",
    signature=("dtype", "experts", "top_k", "renormalise"),
    reference=moe_topk_softmax,
    cases=_cases,
    # exp(-d) of a distance d below the largest logit is off by d units for the rounding of d and as much again where
    # exp is computed as a power of two: 2 d exp(-d) is at most 2 / e units of a weight. exp itself, up to 512 terms
    # summed in any order (four sigmas of sqrt(512 / 2) roundings of a growing sum, a third of that) and two
    # divisions add to the share. Weights are float32 whatever the logits are.
    tolerance=dict.fromkeys(DTYPES, Tolerance(absolute=FLOAT32_UNIT, relative=24 * FLOAT32_UNIT)),
    mutants={
        "always renormalised": _always_renormalised,
        "never renormalised": _never_renormalised,
        "highest id first": _highest_id_first,
        "missing last row": _missing_last_row,
        "last expert unseen": _last_expert_unseen,
        "weights rounded to bfloat16": _weights_in_half,
    },
    workload=Workload(
        "tokens, 8 of 128 experts, float32 logits", (1, 64, 1024, 8192, 65536, 524288, 1048576), _timed
    ),
)
