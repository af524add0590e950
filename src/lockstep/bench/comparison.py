"""Rounds of one contender or several, as figures and as a report."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lockstep.bench.contender import Contender, Round
from lockstep.bench.figures import Figure
from lockstep.bench.report import Report, figure_table
from lockstep.bench.workload import Job
from lockstep.core.output import ModelCard

Rounds = Mapping[str, Sequence[Round]]
"""Contender -> its rounds. The n-th rounds of all contenders answered the same jobs."""


def in_turn(
    contenders: Sequence[Contender], batches: Iterable[Sequence[Job]], title: str
) -> Iterator[tuple[Contender, Sequence[Job]]]:
    """Each contender with each batch, A B A B; stderr says where it is, by a title that may hold {number}."""
    for number, jobs in enumerate(batches, 1):
        for contender in contenders:
            print(f"{title.format(number=number)}: {contender.name}", file=sys.stderr, flush=True)
            yield contender, jobs


def per_round(rounds: Rounds, value: Callable[[Round], float]) -> dict[str, list[float]]:
    """The values of a figure."""
    return {name: [value(one) for one in taken] for name, taken in rounds.items()}


def decode_rates(rounds: Rounds, times_better: float | None = None) -> list[Figure]:
    """Tokens per second once every job had its first; nothing when nothing was left to measure."""
    rates = {name: [one.decode_tokens_per_s for one in taken] for name, taken in rounds.items()}
    known = {name: [rate for rate in found if rate is not None] for name, found in rates.items()}
    if known != rates:
        return []
    return [
        Figure(name="decode", unit="tokens/s", values=known, higher_is_better=True, times_better=times_better)
    ]


def agreement(rounds: Rounds) -> float | None:
    """Share of jobs whose first token is the same for all contenders; None when there is only one.

    Near one for equal weights, near zero for different models: it guards a comparison against itself.
    """
    if len(rounds) < 2:
        return None
    answers = [[token_id for one in taken for token_id in one.first_token_ids] for taken in rounds.values()]
    return statistics.mean(len(set(same)) == 1 for same in zip(*answers, strict=True))


def report_of(
    benchmark: str,
    rounds: Rounds,
    figures: Sequence[Figure],
    *,
    machine: dict[str, Any],
    card: ModelCard,
    workload: Mapping[str, Any],
) -> Report:
    """The figures as a table; `workload` is described with the number of rounds."""
    columns, rows = figure_table(figures)
    share = agreement(rounds)
    return Report(
        benchmark=benchmark,
        machine=machine,
        model=dataclasses.asdict(card),
        workload={**workload, "repeats": len(next(iter(rounds.values())))},
        columns=columns,
        rows=rows,
        results={"figures": [figure.as_json() for figure in figures], "first_token_agreement": share},
        notes=[] if share is None else [f"first tokens that agree: {share:.0%}"],
    )
