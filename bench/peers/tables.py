"""Visits as tables: each row's figures, and Lockstep against the best peer of each figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.bench.figures import Spread
from lockstep.bench.report import shown
from peers.files import SMALL
from peers.markdown import table
from peers.rows import COMMAND, ROWS, SERVER
from peers.visits import CONCURRENT, DECODE, FIRST_TOKEN, MEMORY, START, Visit

MOST_LOST_CORES = 0.1
"""A visit during which others used more processor time than this is left out where a quieter one remains."""
SERVER_SHARE = 0.9
DISTURBED = "no verdict: disturbed"


@dataclass(frozen=True)
class Figure:
    """A column. `reach` and `then` are targets: times the best peer's figure if `relative`, else the figure itself.

    Absolute targets are those of the small model.
    """

    key: str
    title: str
    higher_is_better: bool
    reach: float
    then: float
    relative: bool = True

    def best(self, medians: Mapping[str, float]) -> str:
        """The row with the best figure."""
        return (max if self.higher_is_better else min)(medians, key=lambda row: medians[row])

    def verdict(self, own: float, peer: float) -> str:
        """What the figure reaches, or by which factor it misses the first target."""
        goals = [goal * peer if self.relative else goal for goal in (self.reach, self.then)]
        ratios = [own / goal if self.higher_is_better else goal / own for goal in goals]
        if ratios[1] >= 1:
            return "both reached"
        return "first reached" if ratios[0] >= 1 else f"missed: {ratios[0]:.2f} of the first"


FIGURES = (
    Figure(DECODE, "one request, tokens/s", True, 1.4, 1.9),
    Figure(CONCURRENT, "16 at once, output tokens/s", True, 1.4, 2.0),
    Figure(FIRST_TOKEN, "first token of 512, ms", False, 0.8, 0.55),
    Figure(START, "process start to first token, s", False, 3.0, 1.5, relative=False),
    Figure(MEMORY, "peak memory at 16, MB", False, 700.0, 450.0, relative=False),
)


class Results:
    """The visits to one model."""

    def __init__(self, model: str, visits: Sequence[Visit]) -> None:
        self.model = model
        self.visits = [visit for visit in visits if visit.model == model]
        self.rows = [row.name for row in ROWS[model] if any(visit.row == row.name for visit in self.visits)]
        self.main_row = ROWS[model][0].name
        self._doors = {row.name: row.who for row in ROWS[model]}
        self.server_row = self._row_of(SERVER)

    def counted(self, row: str) -> list[Visit]:
        """A row's quiet visits; all of them when none was quiet."""
        own = [visit for visit in self.visits if visit.row == row]
        return [visit for visit in own if visit.lost_cores <= MOST_LOST_CORES] or own

    def quiet(self, *rows: str) -> bool:
        """True when nobody else took processor time during the visits that count."""
        return all(visit.lost_cores <= MOST_LOST_CORES for row in rows for visit in self.counted(row))

    def spread(self, row: str, figure: str) -> Spread | None:
        """Over visits, each of which counts with the median of its repeats."""
        medians = [
            statistics.median(visit.values[figure]) for visit in self.counted(row) if visit.values.get(figure)
        ]
        return Spread.of(medians) if medians else None

    def peers_medians(self, figure: str) -> dict[str, float]:
        """Row -> median, of everyone but Lockstep."""
        spreads = {
            row: self.spread(row, figure) for row in self.rows if not self._doors[row].startswith("lockstep")
        }
        return {row: spread.median for row, spread in spreads.items() if spread is not None}

    def own_median(self, figure: str) -> float | None:
        """Lockstep's figure on the model's main file: its command's start, everything else in process."""
        found = self.spread(self.own_row(figure), figure)
        return found.median if found is not None else None

    def own_row(self, figure: str) -> str:
        """The row that stands for Lockstep."""
        return self._row_of(COMMAND) if figure == START else self.main_row

    def server_share(self) -> float | None:
        """Throughput over HTTP, over that in process."""
        served, own = self.spread(self.server_row, CONCURRENT), self.spread(self.main_row, CONCURRENT)
        return served.median / own.median if served is not None and own is not None else None

    def agreement(self, row: str) -> float | None:
        """Share of the concurrent prompts whose first token is that of Lockstep on the main file."""
        own = {visit.round_number: visit.first_token_ids for visit in self.visits if visit.row == self.main_row}
        pairs = [
            (a, b)
            for visit in self.visits
            if visit.row == row
            for a, b in zip(visit.first_token_ids, own.get(visit.round_number, ()), strict=False)
        ]
        return statistics.mean(a == b for a, b in pairs) if pairs else None

    def as_json(self) -> dict[str, Any]:
        """Median and range of every figure of every row."""
        found: dict[str, Any] = {}
        for row in self.rows:
            spreads = {figure.key: self.spread(row, figure.key) for figure in FIGURES}
            found[row] = {
                key: {"median": spread.median, "min": spread.min, "max": spread.max}
                for key, spread in spreads.items()
                if spread is not None
            }
            found[row]["first_token_agreement"] = self.agreement(row)
        return {"rows": found, "server_share": self.server_share()}

    def _row_of(self, who: str) -> str:
        return next(row for row, door in self._doors.items() if door == who)


def markdown(results: Results) -> str:
    """Both tables and what is to be known about them."""
    return "\n\n".join(
        [f"## {results.model}", _figures_table(results), _targets_table(results), _notes(results)]
    )


def _figures_table(results: Results) -> str:
    lines = [["", *(figure.title for figure in FIGURES), "same first tokens"]]
    for row in results.rows:
        share = results.agreement(row)
        cells = [_cell(results.spread(row, figure.key)) for figure in FIGURES]
        lines.append([row, *cells, "" if share is None else f"{share:.0%}"])
    return table(lines)


def _targets_table(results: Results) -> str:
    lines = [["", "best peer", "Lockstep", "Lockstep / best peer", "targets", ""]]
    for figure in FIGURES:
        own, peers = results.own_median(figure.key), results.peers_medians(figure.key)
        if own is None or not peers:
            continue
        best = figure.best(peers)
        cells = [figure.title, f"{shown(peers[best])} ({best})", shown(own), f"{own / peers[best]:.2f}"]
        if figure.relative or results.model == SMALL:
            unit = " x" if figure.relative else ""
            goals = f"{figure.reach:g}{unit}, then {figure.then:g}{unit}"
            verdict = figure.verdict(own, peers[best])
            cells += [goals, verdict if results.quiet(best, results.own_row(figure.key)) else DISTURBED]
        lines.append([*cells, *[""] * (len(lines[0]) - len(cells))])
    share = results.server_share()
    if share is not None:
        verdict = "reached" if share >= SERVER_SHARE else f"missed: {share:.2f}"
        if not results.quiet(results.main_row, results.server_row):
            verdict = DISTURBED
        lines.append(
            ["16 streams over HTTP / in process", "", f"{share:.2f}", "", f"{SERVER_SHARE:g}", verdict]
        )
    return table(lines)


def _notes(results: Results) -> str:
    counted = {id(visit) for row in results.rows for visit in results.counted(row)}
    num_noisy = sum(visit.lost_cores > MOST_LOST_CORES for visit in results.visits)
    num_left_out = len(results.visits) - len(counted)
    most = max((visit.lost_cores for visit in results.visits if id(visit) in counted), default=0.0)
    versions = sorted({pair for visit in results.visits for pair in visit.versions.items()})
    lines = [
        f"Medians of visits (least - most); {len(results.visits)} visits, {num_noisy} of them disturbed, "
        f"{num_left_out} left out; others used at most {most:.2f} cores during those counted.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions) + ".",
        *(
            f"Failed: {visit.row}, round {visit.round_number}: {visit.error}"
            for visit in results.visits
            if visit.error
        ),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.min == spread.max:
        return shown(spread.median)
    return f"{shown(spread.median)} ({shown(spread.min)} - {shown(spread.max)})"
