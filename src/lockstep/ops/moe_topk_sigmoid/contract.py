"""Contract of moe_topk_sigmoid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.moe_topk_sigmoid.reference import moe_topk_sigmoid

_Result = tuple[torch.Tensor, torch.Tensor]

_CLEAR = 64 * FLOAT32_UNIT
"""Values that a choice compares lie at least so far apart, or are equal: beyond any kernel's error in a score."""


@dataclass(frozen=True)
class _Routing:
    tokens: int
    experts: int
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    has_bias: bool = True
    spread: float = 2.0
    is_strided: bool = False
    is_crowded: bool = False

    def __str__(self) -> str:
        groups = f", {self.top_k_groups} of {self.num_groups} groups" * (self.num_groups > 1)
        flags = f"{' renormalised' * self.renormalise}{' biased' * self.has_bias}{' strided' * self.is_strided}"
        flags += " crowded" * self.is_crowded
        sizes = f"{self.tokens} tokens, {self.top_k} of {self.experts}{groups}"
        return f"{sizes}, spread {self.spread}, times {self.scale}{flags}"


_ROUTINGS = (
    _Routing(1, 256, 8, 8, 4, scale=2.5),
    _Routing(19, 256, 8, 8, 4, scale=2.5),
    _Routing(5, 128, 8),
    _Routing(7, 64, 6, 4, 2, renormalise=False, scale=16.0),
    _Routing(3, 60, 4, 3, 2),
    _Routing(4, 9, 3, 3, 1),
    _Routing(2, 8, 8, has_bias=False, renormalise=False),
    _Routing(3, 6, 2, 6, 3),
    _Routing(2, 384, 8, scale=2.827),
    _Routing(3, 160, 6, 8, 3, spread=50.0),
    _Routing(3, 32, 4, 4, 2, has_bias=False, spread=0.0),
    _Routing(4, 64, 4, 4, 2, is_strided=True),
    _Routing(0, 64, 4, 4, 2),
    _Routing(9, 256, 8, 8, 4, spread=0.0, is_crowded=True),
    _Routing(9, 256, 8, spread=0.0, is_crowded=True),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for routing in _ROUTINGS:
            yield _case(dtype, routing)


def _case(dtype: torch.dtype, routing: _Routing) -> Case:
    def make(g: torch.Generator) -> tuple[Any, ...]:
        bias = normal(g, routing.experts, dtype=torch.float32, scale=0.3) if routing.has_bias else None
        if routing.is_crowded:
            bias = 1 + torch.randperm(routing.experts, generator=g) // 2 * 2 * _CLEAR
        logits = torch.empty(0, routing.experts, dtype=dtype)
        while len(logits) < routing.tokens:
            row = normal(g, 1, routing.experts, dtype=dtype, scale=routing.spread)
            logits = torch.cat((logits, row)) if _is_clear(row, bias, routing) else logits
        return (
            strided(logits) if routing.is_strided else logits,
            bias,
            routing.top_k,
            routing.num_groups,
            routing.top_k_groups,
            routing.renormalise,
            routing.scale,
        )

    signature = {
        "dtype": dtype,
        "experts": routing.experts,
        "top_k": routing.top_k,
        "num_groups": routing.num_groups,
        "top_k_groups": routing.top_k_groups,
    }
    return Case(f"{dtype} {routing}", signature, make)


def _is_clear(logits: torch.Tensor, bias: torch.Tensor | None, routing: _Routing) -> bool:
    """True when no choice hangs on the rounding of a score."""
    choice = torch.sigmoid(logits.double()) + (0 if bias is None else bias.double())
    groups = choice.view(routing.num_groups, -1).sort(-1).values[:, -2:].sum(-1)
    gaps = torch.cat([values.flatten().sort().values.diff() for values in (choice, groups)])
    return bool(((gaps == 0) | (gaps > _CLEAR)).all())


def _bias_in_weights(logits: Any, bias: Any, top_k: int, *rest: Any) -> _Result:
    weights, ids = moe_topk_sigmoid(logits, bias, top_k, *rest)
    return weights if bias is None else weights + bias[ids.long()], ids


def _bias_ignored(logits: Any, bias: Any, *rest: Any) -> _Result:
    return moe_topk_sigmoid(logits, None, *rest)


def _scale_forgotten(
    logits: Any, bias: Any, top_k: int, groups: int, top_k_groups: int, renormalise: bool, scale: float
) -> _Result:
    return moe_topk_sigmoid(logits, bias, top_k, groups, top_k_groups, renormalise, 1.0)


def _scaled_before_dividing(*arguments: Any) -> _Result:
    weights, ids = moe_topk_sigmoid(*arguments)
    renormalise, scale = arguments[-2:]
    return weights / scale if renormalise else weights, ids


def _not_renormalised(
    logits: Any, bias: Any, top_k: int, groups: int, top_k_groups: int, renormalise: bool, scale: float
) -> _Result:
    return moe_topk_sigmoid(logits, bias, top_k, groups, top_k_groups, False, scale)


def _groups_ignored(logits: Any, bias: Any, top_k: int, num_groups: int, *rest: Any) -> _Result:
    return moe_topk_sigmoid(logits, bias, top_k, 1, *rest)


def _groups_by_best_one(
    logits: Any, bias: Any, top_k: int, num_groups: int, top_k_groups: int, *rest: Any
) -> _Result:
    scores = torch.sigmoid(logits.float()) + (0 if bias is None else bias)
    best = scores.unflatten(-1, (num_groups, -1)).amax(-1)
    out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(top_k_groups).indices, False)
    hidden = logits.unflatten(-1, (num_groups, -1)).masked_fill(out.unsqueeze(-1), -100.0).flatten(1)
    return moe_topk_sigmoid(hidden, bias, top_k, 1, 1, *rest)


def _highest_id_first(logits: Any, bias: Any, *rest: Any) -> _Result:
    weights, ids = moe_topk_sigmoid(logits.flip(-1), None if bias is None else bias.flip(-1), *rest)
    return weights, logits.shape[1] - 1 - ids


def _timed(tokens: int) -> Case:
    """64 different rows over and over: rows whose choice is clear are slow to find."""
    rows = _case(torch.float32, _Routing(64, 256, 8, 8, 4, scale=2.5))

    def make(g: torch.Generator) -> tuple[Any, ...]:
        logits, *rest = rows.make(g)
        return logits.repeat(-(-tokens // 64), 1)[:tokens].contiguous(), *rest

    return Case(f"{tokens} tokens", rows.signature, make)


CONTRACT = Contract(
    name="moe_topk_sigmoid",
    summary="the top_k largest of sigmoid(logits) + bias within the best groups, and their scaled scores",
    arguments=(
        Argument("logits", ("token", "expert")),
        Argument("bias", ("expert",), note="float32, optional: corrects the choice, not the weights"),
        Argument("top_k", note="experts of each token, at most those of the chosen groups"),
        Argument("num_groups", note="groups of neighbouring experts; 1 for none"),
        Argument("top_k_groups", note="groups that compete"),
        Argument("renormalise", note="divide the chosen scores by their sum + 1e-20"),
        Argument("scale", note="multiplies every weight, renormalised or not"),
    ),
    returns=("weights[token, choice]", "ids[token, choice]"),
    rounding="float32 inside and float32 weights; the choice is exact where values differ by more than rounding",
    signature=("dtype", "experts", "top_k", "num_groups", "top_k_groups"),
    reference=moe_topk_sigmoid,
    cases=_cases,
    # The sigmoid of a logit l below zero is off by the roundings of exp(-l): |l| units where exp is computed as a power
    # of two, and 1 + exp, the quotient and exp itself add four. Chosen logits lie above -4 and their scores below 1,
    # except in saturated rows, whose scores near zero are covered by the absolute part: |l| exp(-|l|) is at most 1 / e.
    # The sum of eight, the division and the scale (up to 16) come on top.
    tolerance=dict.fromkeys(DTYPES, Tolerance(absolute=16 * FLOAT32_UNIT / 2.7, relative=12 * FLOAT32_UNIT)),
    mutants={
        "bias added to the weights": _bias_in_weights,
        "bias ignored": _bias_ignored,
        "scale forgotten": _scale_forgotten,
        "scaled before dividing": _scaled_before_dividing,
        "not renormalised": _not_renormalised,
        "groups ignored": _groups_ignored,
        "groups by their best expert": _groups_by_best_one,
        "highest id first": _highest_id_first,
    },
    workload=Workload(
        "tokens, 8 of 256 experts in 4 of 8 groups, float32 logits",
        (1, 64, 1024, 8192, 65536, 262144, 1048576),
        _timed,
    ),
)
