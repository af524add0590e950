"""Runs the Triton kernels at both ends of a step in Triton's interpreter: `python interpreted.py SEED`.

Checks every case of their contracts in one dtype, then rows of a few hundred tokens against a sort in plain Python's
integers. Exits 1 on a failure, and where a kernel refuses a case.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops_basic"))

import numpy as np
import torch
from triton_interpreter import dtypes_in_turn

from lockstep.ops.argmax.programs import search
from lockstep.ops.argmax.reference import argmax
from lockstep.ops.check import check_kernel
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.top_k_top_p_sample import programs
from lockstep.ops.top_k_top_p_sample.programs import sample
from lockstep.ops.top_k_top_p_sample.reference import scores_of

ROUNDING = 3e-6
"""Of a row's weight: nearer than this, a limit or a draw may fall either way."""


def by_hand(scores_V: torch.Tensor, top_k: int, top_p: float, min_p: float, draw: float) -> set[int]:
    """The tokens that a row may get."""
    weights = np.exp(scores_V.double().numpy())
    found: set[int] = set()
    for nudge in (-ROUNDING, 0.0, ROUNDING):
        order = np.arange(len(weights))
        if top_k > 0 or top_p < 1 or min_p > 0:
            order = np.argsort(-scores_V.numpy(), kind="stable")[: top_k if top_k > 0 else None]
            before = weights[order].cumsum() - weights[order]
            order = order[before < (top_p + nudge) * weights[order].sum()] if top_p < 1 else order
            order = order[weights[order] >= min_p * (1 + nudge)]
            order = order if len(order) else scores_V.argmax()[None].numpy()
        sums = weights[order].cumsum()
        targets = np.array([draw - ROUNDING, draw + ROUNDING]) * sums[-1]
        first, last = np.searchsorted(sums, targets, side="right")
        found.update(order[first : last + 1].tolist())
    return found


def check_by_hand(seed: int) -> list[str]:
    """Rows of every mix of filters over scores of several widths, a fourth of them rounded so that many are equal."""
    g = torch.Generator().manual_seed(seed)
    rows, vocab_size = 32, 777
    logits_RV = (
        torch.randn(rows, vocab_size, generator=g)
        * torch.tensor([0.01, 1.0, 4.0, 30.0]).repeat(rows // 4)[:, None]
    )
    logits_RV[::4] = logits_RV[::4].sign().clamp_min(0)
    logits_RV[1::8] = (logits_RV[1::8] * 2).round() / 2
    logits_RV[2::8, 5:] = -torch.inf
    temperature_R = 0.2 + 2 * torch.rand(rows, generator=g)
    on = torch.rand(3, rows, generator=g) < 0.5
    some_R = torch.randint(1, 2 * vocab_size, (rows,), generator=g) >> torch.randint(
        0, 10, (rows,), generator=g
    )
    top_k_R = torch.where(on[0], some_R, 0)
    top_p_R = torch.where(on[1], torch.rand(rows, generator=g), 1.0)
    min_p_R = torch.where(on[2], torch.rand(rows, generator=g) ** 4, 0.0)
    draw_R = torch.rand(rows, generator=g, dtype=torch.float64)
    draw_R[::7], draw_R[::11] = 0.0, 1 - 2.0**-53
    limits = (temperature_R, top_k_R, top_p_R, min_p_R, draw_R)
    found = sample(logits_RV, *limits).tolist()
    scores_RV = scores_of(logits_RV, temperature_R)
    wrong = []
    filters_and_draws = zip(*(limit.tolist() for limit in limits[1:]), strict=True)
    for row, limit in enumerate(filters_and_draws):
        allowed = by_hand(scores_RV[row], *limit)
        if found[row] not in allowed:
            wrong.append(f"row {row} {limit}: {found[row]}, not of {allowed}")
    # A row's token is its own, in whatever company, and where its neighbour's logits are no numbers.
    logits_RV[0], logits_RV[3] = torch.nan, -torch.inf
    programs.ROWS_AT_ONCE = 20
    again = sample(logits_RV.flip(0), *(limit.flip(0) for limit in limits)).flip(0).tolist()
    wrong += [f"row {row} alone" for row in range(rows) if row not in (0, 3) and again[row] != found[row]]
    wrong += [f"row {row} has no token" for row in (0, 3) if not 0 <= again[row] < vocab_size]
    return wrong


def check_not_a_number(seed: int) -> list[str]:
    """Of several NaN the first is the largest value, whatever its sign; zeros are equal."""
    g = torch.Generator().manual_seed(seed)
    rows_RV = torch.randn(4, 20000, generator=g)
    rows_RV[0, [9000, 15000]] = torch.nan
    rows_RV[1, 3] = -torch.tensor(torch.nan)
    rows_RV[1, 100] = torch.inf
    rows_RV[2] = torch.tensor([-0.0, 0.0]).repeat(10000)
    rows_RV[3] = -torch.inf
    (best, at), (wanted, place) = search(rows_RV), argmax(rows_RV)
    same = torch.equal(at, place) and torch.equal(best.nan_to_num(7.5), wanted.nan_to_num(7.5))
    return [] if same else [f"{at.tolist()}, not {place.tolist()}"]


def main(seed: int) -> int:
    torch.set_num_threads(1)
    failures: list[str] = []
    for op in ("argmax", "begin_rows", "choose_greedy", "copy_words", "top_k_top_p_sample"):
        kernel = next(kernel for kernel in kernels(op) if kernel.provider == "triton")
        cases = list(dtypes_in_turn(contracts()[op].cases()))
        report = check_kernel(replace(contracts()[op], cases=partial(iter, cases)), kernel, seed=seed)
        print(f"{op}, seed {seed}: {report.num_cases} cases")
        failures += [*report.failures, *(f"{op} refuses {case}: {why}" for case, why in report.refused)]
    failures += check_by_hand(seed) + check_not_a_number(seed)
    print(*failures[:9], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
