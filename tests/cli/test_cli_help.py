"""The help of every command: it fits a page, and says what an option is that nobody writes."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

import lockstep as package
from lockstep.cli.group import lockstep
from lockstep.cli.options import DeclaredType

pytestmark = pytest.mark.suite("cpu")

WIDTH = 100


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """One for each command, groups included, as when the user asks for its help on a wide terminal."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None, each
            yield from contexts(found, each, context)


EVERY = list(contexts(lockstep, "lockstep"))


@pytest.mark.parametrize("context", EVERY, ids=lambda context: context.command_path)
def test_it_fits_a_page(context: click.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    lines = context.get_help().splitlines()
    assert max(map(len, lines)) > WIDTH - 40, "a narrow terminal proves nothing"
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("context", EVERY, ids=lambda context: context.command_path)
def test_defaults_are_said(context: click.Context) -> None:
    unsaid = []
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.is_flag:
            continue
        declared = option.type.option if isinstance(option.type, DeclaredType) else None
        default = declared.default if declared is not None else option.get_default(context)
        shown = option.help or ""
        if isinstance(default, (int, float, str)) and not ("[" in shown or "omitted" in shown.lower()):
            unsaid.append((option.opts[0], default))
    assert unsaid == []


def test_there_are_commands_below_groups() -> None:
    paths = {context.command_path for context in EVERY}
    assert {"lockstep run", "lockstep bench latency", "lockstep suites run"} <= paths


def test_the_package_lists_what_it_offers() -> None:
    """Imported lazily, but there for a prompt that completes names."""
    assert set(dir(package)) == set(package.__all__)
    for name in dir(package):
        assert getattr(package, name) is not None
