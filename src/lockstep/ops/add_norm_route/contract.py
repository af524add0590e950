"""Contract of add_norm_route."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.ops.add_norm_route.reference import add_norm_route
from lockstep.ops.cases import DTYPES, normal, product_scale, strided
from lockstep.ops.contract import (
    FLOAT32_UNIT,
    Argument,
    Case,
    Contract,
    Signature,
    Tolerance,
    Workload,
    rounded,
)
from lockstep.ops.linear.reference import linear
from lockstep.ops.moe_topk_softmax.reference import moe_topk_softmax
from lockstep.ops.rms_norm.reference import rms_norm

_Result = tuple[torch.Tensor, ...]

_MOST_SUMMED = 1100
_SUMS = 4 * (_MOST_SUMMED / 2) ** 0.5 * FLOAT32_UNIT
"""What a logit near one is off by for the order of its sum: see the contract of linear."""

_EPS = 1e-6
_AT_ONCE = 64
"""Rows that are drawn before those are kept whose choice is clear."""


@dataclass(frozen=True)
class _Routing:
    """Logits are normal with a deviation of one, below 4.5 in size. `paired`: each expert and the next one are equal.

    A router of pairs reads one input for two experts, so that ties are exact in any order of summing.
    """

    rows: int
    inputs: int
    experts: int
    top_k: int
    renormalise: bool = True
    adds: bool = True
    paired: bool = False
    float32_norm: bool = False
    size: float = 1.0

    def __str__(self) -> str:
        flags = {
            "no update": not self.adds,
            "renormalised": self.renormalise,
            "in pairs": self.paired,
            "float32 norm": self.float32_norm,
        }
        told = "".join(f", {name}" for name, is_so in flags.items() if is_so)
        return f"{self.rows}x{self.inputs}, {self.top_k} of {self.experts}{told}, size {self.size:g}"


_ROUTINGS = (
    _Routing(1, 2048, 128, 8),
    _Routing(8, 256, 128, 8),
    _Routing(16, 320, 128, 8, renormalise=False),
    _Routing(5, 577, 60, 4),
    _Routing(7, 100, 9, 3, renormalise=False),
    _Routing(2, 64, 8, 8, renormalise=False),
    _Routing(17, 64, 16, 2),
    _Routing(32, 96, 7, 1),
    _Routing(0, 64, 16, 4),
    _Routing(1, 16384, 16, 2),
    _Routing(33, 64, 16, 2, adds=False, renormalise=False),
    _Routing(3, 320, 64, 6, adds=False),
    _Routing(6, 128, 64, 5, paired=True),
    _Routing(9, 96, 32, 3, paired=True),
    _Routing(3, 64, 16, 4, size=0.0),
    _Routing(2, 64, 16, 4, size=1e-3),
    _Routing(2, 64, 16, 4, size=1e3),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for routing in _ROUTINGS:
            yield _case(dtype, routing)
        if dtype != torch.float32:
            yield _case(dtype, _Routing(2, 320, 64, 4, float32_norm=True))


def _case(dtype: torch.dtype, routing: _Routing) -> Case:
    norm_dtype = torch.float32 if routing.float32_norm else dtype

    def make(g: torch.Generator) -> tuple[Any, ...]:
        norm_weight = normal(g, routing.inputs, dtype=norm_dtype, scale=0.1) + 1
        router = _router(g, dtype, routing)
        streams = torch.empty(2, 0, routing.inputs, dtype=dtype)
        while streams.shape[1] < routing.rows:
            drawn = normal(g, 2, _AT_ONCE, routing.inputs, dtype=dtype, scale=routing.size)
            drawn[0] *= routing.adds
            streams = torch.cat((streams, drawn[:, _is_clear(drawn.sum(0), norm_weight, router, routing)]), 1)
        update, residual = (strided(rows[: routing.rows]) for rows in streams)
        given = (residual, norm_weight, _EPS, router, routing.top_k, routing.renormalise)
        return update if routing.adds else None, *given

    signature: Signature = {
        "dtype": dtype,
        "weight_dtype": norm_dtype,
        "inputs": routing.inputs,
        "experts": routing.experts,
        "top_k": routing.top_k,
        "renormalise": routing.renormalise,
        "adds": routing.adds,
    }
    return Case(f"{dtype} {routing}", signature, make)


def _router(g: torch.Generator, dtype: torch.dtype, routing: _Routing) -> torch.Tensor:
    shape = (routing.experts, routing.inputs)
    if not routing.paired:
        return normal(g, *shape, dtype=dtype, scale=product_scale(routing.inputs, _MOST_SUMMED))
    read = torch.randperm(routing.inputs, generator=g)[torch.arange(routing.experts) // 2]
    return torch.zeros(shape, dtype=dtype).scatter_(1, read[:, None], 1.0)


def _is_clear(
    total: torch.Tensor, norm_weight: torch.Tensor, router: torch.Tensor, routing: _Routing
) -> torch.Tensor:
    """Of each row, whether no choice hangs on a rounding: logits lie apart by more than that, or are equal.

    A logit rounds by a unit of itself, and its inputs' roundings walk 0.4 units: six sigmas of two of them.
    """
    normed = rms_norm(total.double(), norm_weight.double(), _EPS)
    best = linear(normed, router.double()).sort(-1, descending=True).values[:, : routing.top_k + 1]
    gaps, sizes = -best.diff(dim=-1), best.abs()
    unit = torch.finfo(router.dtype).eps / 2
    near = (2 * torch.maximum(sizes[:, 1:], sizes[:, :-1]) + 4) * unit + 3 * _SUMS
    return ((gaps == 0) | (gaps > near)).all(-1)


def _changed(at: int, change: Callable[[Any], Any]) -> Callable[..., _Result]:
    """The reference over arguments of which one is changed."""

    def wrong(*given: Any) -> _Result:
        changed = [*given[:at], change(given[at]), *given[at + 1 :]]
        return add_norm_route(*changed)

    return wrong


def _without_the_last(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda router: router.index_fill(dim, torch.tensor([router.shape[dim] - 1]), 0.0)


def _stream_not_updated(*given: Any) -> _Result:
    normed, _, *routing = add_norm_route(*given)
    return normed, given[1], *routing


def _routed_before_the_norm(*given: Any) -> _Result:
    normed, total, *_ = add_norm_route(*given)
    return normed, total, *moe_topk_softmax(linear(total, given[4]), *given[5:])


def _highest_id_first(*given: Any) -> _Result:
    normed, total, weights, ids = _changed(4, lambda router: router.flip(0))(*given)
    return normed, total, weights, len(given[4]) - 1 - ids


def _routing_of_the_next_row(*given: Any) -> _Result:
    normed, total, weights, ids = add_norm_route(*given)
    return normed, total, weights.roll(-1, 0), ids.roll(-1, 0)


def _timed(rows: int) -> Case:
    return _case(torch.bfloat16, _Routing(rows, 2048, 128, 8))


def _flops(update: torch.Tensor | None, residual: torch.Tensor, *given: Any) -> int:
    return 2 * residual.shape[0] * int(given[2].numel())


CONTRACT = Contract(
    name="add_norm_route",
    summary="total = residual + update; normed = rms_norm(total); the top_k largest of softmax(normed @ router^T)",
    arguments=(
        Argument("update", ("row", "input"), note="None to normalise the stream as it is"),
        Argument("residual", ("row", "input"), scratch=True, note="may be overwritten with the sum"),
        Argument("norm_weight", ("input",), note="in the dtype of the residual, or in float32"),
        Argument("eps"),
        Argument("router", ("expert", "input"), constant=True),
        Argument("top_k", note="experts of each row, at most all"),
        Argument("renormalise", note="divide the chosen weights by their sum"),
    ),
    returns=("normed[row, input]", "total[row, input]", "weights[row, choice]", "ids[row, choice]"),
    rounding=(
        "the sum, the normalised rows and the logits to the dtype; float32 weights. The choice is exact where logits "
        "differ by more than rounding, equal ones in the order of their ids"
    ),
    signature=("dtype", "weight_dtype", "inputs", "experts", "top_k", "renormalise", "adds"),
    reference=add_norm_route,
    cases=_cases,
    # As add_rms_norm; in narrow rows the roundings of the sum also show in the scale of the norm.
    tolerance=rounded(3, maths=16),
    # Logits below 4.5 are off by so many units for their rounding, by 2.4 (six sigmas) for that of the rows, and by the
    # order of their sums. exp makes that a share of a weight, and of the sum that divides it; it adds its own as in
    # moe_topk_softmax.
    tolerance_of={
        "weights": {
            dtype: Tolerance(FLOAT32_UNIT, 14 * torch.finfo(dtype).eps / 2 + 2 * _SUMS + 24 * FLOAT32_UNIT)
            for dtype in DTYPES
        },
        "ids": dict.fromkeys(DTYPES, Tolerance(0, 0)),
    },
    mutants={
        "residual added twice": _changed(1, lambda residual: 2 * residual),
        "stream not updated": _stream_not_updated,
        "ten times eps": _changed(3, lambda eps: 10 * eps),
        "one input short": _changed(4, _without_the_last(1)),
        "last expert unseen": _changed(4, _without_the_last(0)),
        "routed before the norm": _routed_before_the_norm,
        "always renormalised": _changed(6, lambda renormalise: True),
        "never renormalised": _changed(6, lambda renormalise: False),
        "highest id first": _highest_id_first,
        "routing of the next row": _routing_of_the_next_row,
    },
    workload=Workload("rows of 2048, 8 of 128 experts, bfloat16", (1, 4, 8, 16, 32), _timed, num_flops=_flops),
    parts=("rms_norm", "add_rms_norm", "linear", "moe_topk_softmax"),
)
