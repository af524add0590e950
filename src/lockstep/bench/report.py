"""A result, as a table for people and as JSON for programs; both name the machine and the command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.bench.figures import Figure, Spread
from lockstep.bench.fingerprint import describe, was_busy
from lockstep.bench.tables import console, new_table, show
from lockstep.core.errors import ConfigError


@dataclass(kw_only=True)
class Report:
    """What was measured, where, on what. `rows` are texts under `columns`; `results` is the same for programs.

    `notes` are lines below the table.
    """

    benchmark: str
    machine: dict[str, Any]
    model: Mapping[str, Any]
    workload: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def publish(self, json_out: Path | None) -> None:
        """Prints the table and writes JSON to `json_out`, if there is one. Raises ConfigError if it cannot."""
        self._print()
        if json_out is not None:
            try:
                json_out.write_text(
                    json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
            except OSError as error:
                raise ConfigError(f"--json {json_out} cannot be written: {error.strerror or error}") from None

    def as_json(self) -> dict[str, Any]:
        """The whole result."""
        return {
            "benchmark": self.benchmark,
            "command": command_line(),
            "machine": self.machine,
            "model": self.model,
            "workload": self.workload,
            "results": self.results,
            "notes": self.notes,
        }

    def _print(self) -> None:
        from rich.text import Text

        out = console()
        out.print(Text(self._title(), style="bold"), soft_wrap=True)
        table = new_table()
        for position, title in enumerate(self.columns):
            table.add_column(title, justify="left" if position == 0 else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        show(table, out)
        for line in [*self.notes, *describe(self.machine), command_line()]:
            out.print(Text(line, style="dim"), soft_wrap=True)
        if was_busy(self.machine):
            text = f"the machine was not quiet: load {self.machine['load_average']:.2f} before the measure"
            out.print(Text(text, style="yellow"), soft_wrap=True)

    def _title(self) -> str:
        subject = ", ".join(str(self.model[key]) for key in ("name", "dtype") if key in self.model)
        asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.workload.items())
        return f"{self.benchmark}: {subject} ({asked})"


def figure_table(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a line per figure, its median with the range, the advantage, the target."""
    contenders = list(figures[0].values)
    compared = len(contenders) > 1
    columns = ["median (min - max)", *contenders, *(["times better"] if compared else []), "target"]
    rows = []
    for figure in figures:
        row = [f"{figure.name}{f', {figure.unit}' if figure.unit else ''}"]
        row += [_range(figure.values.get(name, ())) for name in contenders]
        if compared:
            row.append(f"{figure.advantage.median:.2f}" if figure.advantage is not None else "")
        verdict = {None: "", True: ": reached", False: ": missed"}[figure.reached]
        rows.append([*row, f"{figure.target or ''}{verdict}"])
    return columns, rows


def command_line() -> str:
    """The command that is running, to be typed again."""
    return shlex.join(["lockstep", *sys.argv[1:]])


def shown(value: float) -> str:
    """A number with three significant digits, or all digits before the point; a count as it is."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = Spread.of(values)
    text = shown(spread.median)
    return text if len(values) == 1 else f"{text} ({shown(spread.min)} - {shown(spread.max)})"
