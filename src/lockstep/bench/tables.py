"""Tables for people: as wide as the terminal, and in pipes without blanks at the ends of lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPED_WIDTH = 140
"""Columns of a table that is not written to a terminal."""


def console() -> Console:
    """Writes to stdout."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=_PIPED_WIDTH, highlight=False)


def new_table() -> Table:
    """Without columns and rows yet; a line under the titles is its only one."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")


def show(table: Table, to: Console) -> None:
    """Writes it."""
    if to.is_terminal:
        to.print(table)
        return
    with to.capture() as captured:
        to.print(table)
    lines = (line.rstrip() for line in captured.get().splitlines())
    print(*filter(None, lines), sep="\n")
