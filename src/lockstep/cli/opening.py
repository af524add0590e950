"""Opening a model, with a progress bar when somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from lockstep.config import Given
from lockstep.core.garbage import start_without_collecting
from lockstep.tokenizer.token_ids_only import TokenIdsOnly

if TYPE_CHECKING:
    from lockstep.engine.llm import LLM

Progress = Callable[[str, int, int], None]
"""(what is being done, how much is done, how much there is)."""


@contextmanager
def open_llm(options: Mapping[str, Given]) -> Iterator[LLM]:
    """An engine in this process, closed at the end."""
    from lockstep.engine.model_files import read_ahead_weights

    read_ahead_weights(options)

    with start_without_collecting(), loading_bar() as progress:
        from lockstep.engine.llm import LLM

        llm = LLM(progress=progress, options=options)
    try:
        yield llm
    finally:
        llm.close()


def require_chat_template(llm: LLM, or_else: str = "") -> None:
    """Raises UsageError with what a user can do about a model that cannot converse; `or_else` ends the text."""
    if isinstance(llm.tokenizer, TokenIdsOnly):
        raise click.UsageError("--skip-tokenizer-init leaves nothing to read text with: leave it out here")
    if llm.tokenizer.chat_template is None:
        raise click.UsageError(
            f"{llm.card.name} has no chat template: --chat-template FILE gives it one{or_else}"
        )


@contextmanager
def loading_bar() -> Iterator[Progress | None]:
    """A callback that draws a bar on stderr, gone when done; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("[dim]{task.description}"), BarColumn(bar_width=32), TaskProgressColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
