"""Results as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Writes rows under titles to stdout; the columns named in `right` hold numbers."""
    from rich.text import Text

    from lockstep.bench.tables import console, new_table, show

    table = new_table()
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    show(table, console())


def print_json(value: Any) -> None:
    """Writes one JSON document to stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
