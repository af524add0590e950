"""Contract of top_k_top_p_sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.top_k_top_p_sample.reference import (
    has_filter,
    kept_weights,
    scores_of,
    top_k_top_p_sample,
)

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_SHAPES = (
    (1, 64, 3.0, 20),
    (24, 1001, 3.0, 60),
    (0, 64, 3.0, 20),
    (6, 1200, 0.02, 700),
    (1, 8, 0.0, 4),
)
_LARGE = (1, 128256, 4.0, 50)
"""Rows, vocabulary, spread of the logits, and how many tokens top-k and top-p may leave."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, vocab_size, spread, most in (*_SHAPES, *([_LARGE] if dtype == torch.bfloat16 else [])):
            for masked in (False, True) if rows * vocab_size < 30000 else (False,):

                def make(
                    g: torch.Generator,
                    sizes: tuple[int, int, int] = (rows, vocab_size, most),
                    spread: float = spread,
                    masked: bool = masked,
                    dtype: torch.dtype = dtype,
                ) -> _Arguments:
                    rows, vocab_size, most = sizes
                    logits = normal(g, rows, vocab_size, dtype=dtype, scale=spread)
                    if masked:
                        logits[torch.rand(logits.shape, generator=g) < 0.9] = -torch.inf
                        logits[:, vocab_size // 2] = 0
                    return _well_posed(g, logits, most)

                yield Case(
                    f"{dtype} {rows}x{vocab_size}, spread {spread}{', most forbidden' if masked else ''}",
                    {"dtype": dtype, "vocab_size": vocab_size},
                    make,
                )


def _well_posed(g: torch.Generator, logits_RV: torch.Tensor, most: int, first_kind: int = 0) -> _Arguments:
    """Filters and draws that no rounding can tip over: each limit lies in the middle between two tokens.

    Rows take turns, from `first_kind` on: no filter, top-k, top-p, min-p, all of them, top-k and top-p.
    """
    num_rows, vocab_size = logits_RV.shape
    kind_R = (torch.arange(num_rows) + first_kind) % 6
    temperature_R = 0.5 + torch.rand(num_rows, generator=g)
    weights_RV = scores_of(logits_RV, temperature_R).double().softmax(-1)
    sorted_RV = weights_RV.sort(dim=-1, descending=True, stable=True).values

    def one_of_the_best() -> torch.Tensor:
        return (torch.rand(num_rows, generator=g) * min(most, vocab_size)).long()

    def on(*kinds: int) -> torch.Tensor:
        return torch.isin(kind_R, torch.tensor(kinds))

    off = torch.zeros(num_rows)
    top_k_R = torch.where(on(1, 4, 5), one_of_the_best() + 1, 0)
    left_RV = kept_weights(sorted_RV, top_k_R, off + 1, off, vocab_size)
    last_R1 = torch.minimum(one_of_the_best(), (left_RV > 0).sum(-1) - 1)[:, None]
    middle_R = (left_RV.cumsum(-1) - left_RV / 2).gather(-1, last_R1).flatten() / left_RV.sum(-1)
    top_p_R = torch.where(on(2, 4, 5), middle_R, 1.0).float()
    # The widest step among the best weights: half-way down it no other weight is near.
    steps_RC = -sorted_RV[:, :32].diff(dim=-1) / sorted_RV[:, :1]
    widest_R1 = steps_RC.argmax(-1, keepdim=True)
    half_way_R = (sorted_RV / sorted_RV[:, :1]).gather(-1, widest_R1) - steps_RC.gather(-1, widest_R1) / 2
    min_p_R = torch.where(on(3, 4), half_way_R.flatten(), 0.0).float()

    kept_RV = kept_weights(sorted_RV, top_k_R, top_p_R, min_p_R, vocab_size)
    filtered_R1 = has_filter(top_k_R, top_p_R, min_p_R)[:, None]
    shares_RV = torch.where(filtered_R1, kept_RV, weights_RV)
    shares_RV /= shares_RV.sum(-1, keepdim=True)
    likely_RV = torch.where(shares_RV >= shares_RV.amax(-1, keepdim=True) / 100, shares_RV, 0.0)
    chosen_R1 = torch.multinomial(likely_RV, 1, generator=g) if num_rows else last_R1
    draw_R = (shares_RV.cumsum(-1) - shares_RV / 2).gather(-1, chosen_R1).flatten()
    return logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, draw_R


def _no_temperature(logits: torch.Tensor, temperature: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return top_k_top_p_sample(logits, torch.ones_like(temperature), *rest)


def _one_token_more(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, *rest: torch.Tensor
) -> torch.Tensor:
    return top_k_top_p_sample(logits, temperature, top_k + (top_k > 0), *rest)


def _top_p_of_the_vocabulary(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draw: torch.Tensor,
) -> torch.Tensor:
    """top-p before top-k."""
    weights = scores_of(logits, temperature).softmax(-1).sort(dim=-1, descending=True).values
    mass = kept_weights(weights, top_k, torch.ones_like(top_p), torch.zeros_like(min_p), logits.shape[-1])
    return top_k_top_p_sample(logits, temperature, top_k, top_p / mass.sum(-1), min_p, draw)


def _no_min_p(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draw: torch.Tensor,
) -> torch.Tensor:
    return top_k_top_p_sample(logits, temperature, top_k, top_p, torch.zeros_like(min_p), draw)


def _draw_from_the_other_end(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draw: torch.Tensor,
) -> torch.Tensor:
    return top_k_top_p_sample(logits, temperature, top_k, top_p, min_p, 1 - draw)


def _draw_of_the_next_row(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draw: torch.Tensor,
) -> torch.Tensor:
    return top_k_top_p_sample(logits, temperature, top_k, top_p, min_p, draw.roll(-1))


def _timed(rows: int) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        return _well_posed(g, normal(g, rows, 151936, dtype=torch.float32, scale=4.0), 50, first_kind=4)

    return Case(f"{rows} rows", {"dtype": torch.float32, "vocab_size": 151936}, make)


CONTRACT = Contract(
    name="top_k_top_p_sample",
    summary="the token in whose share of the filtered weights a draw falls",
    arguments=(
        Argument("logits", ("row", "vocab"), note="-inf for tokens that are forbidden"),
        Argument("temperature", ("row",), note="float32; 0 counts as the smallest positive number"),
        Argument("top_k", ("row",), note="int64; below 1 is off"),
        Argument("top_p", ("row",), note="float32 in (0, 1]; 1 is off"),
        Argument("min_p", ("row",), note="float32 in [0, 1]; 0 is off"),
        Argument("draw", ("row",), note="float64 in [0, 1)"),
    ),
    returns=("token_id[row]",),
    rounding="weights in float32, running sums in float64; a limit or draw that rounding reaches may fall either way",
    signature=("dtype", "vocab_size"),
    reference=top_k_top_p_sample,
    cases=_cases,
    # Ids are right or wrong: the cases keep every limit and draw away from where rounding decides.
    tolerance={torch.int64: Tolerance(0, 0)},
    mutants={
        "no temperature": _no_temperature,
        "one token more than top-k": _one_token_more,
        "top-p of the whole vocabulary": _top_p_of_the_vocabulary,
        "no min-p": _no_min_p,
        "draw from the other end": _draw_from_the_other_end,
        "draw of the next row": _draw_of_the_next_row,
    },
    workload=Workload("rows of 151936 float32 logits, every kind of filter", (1, 16, 64, 256), _timed),
)
