"""Turns declared options into click's, and what click parsed into what the user gave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import click

from lockstep.config import Given
from lockstep.config.components import ENGINE_OPTIONS, SERVER_OPTIONS
from lockstep.config.option import Option

Command = Callable[..., Any]


class DeclaredType(click.ParamType):
    """Parses with the option's own declaration, so that a value is checked alike wherever it was written."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self.name = option.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        written_as = self.option.metavar if self.option.positional else self.option.flag
        return self.option.parse(value, written_as) if isinstance(value, str) else value


class SectionOption(click.Option):
    """An option that knows under which title the help lists it."""

    def __init__(self, *args: Any, section: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Nothing: each help text says its default itself."""
        return {}


class SectionedCommand(click.Command):
    """A command whose help groups options by section, those without one last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param.type, DeclaredType) and param.type.option.positional:
                option = param.type.option
                sections.setdefault(option.component.capitalize(), []).append(
                    (f"[{option.metavar}]", option.help)
                )
            elif isinstance(param, click.Option):
                record = param.get_help_record(ctx)
                sections.setdefault(getattr(param, "section", "Other"), []).extend([record] if record else [])
        other = sections.pop("Other")
        for title, records in (*sections.items(), ("Other", other)):
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


def section(title: str) -> Callable[..., Callable[[Command], Command]]:
    """`click.option` for options listed under `title`."""
    return functools.partial(click.option, cls=SectionOption, section=title)


def engine_options(*, omit: Iterable[str] = ()) -> Callable[[Command], Command]:
    """Adds MODEL and every option of the engine; the command receives `options`, name -> Given."""
    return _declared([option for name, option in ENGINE_OPTIONS.items() if name not in set(omit)])


def server_options(function: Command) -> Command:
    """Adds the engine's and the server's options; the command receives `options`, name -> Given."""
    return _declared([*ENGINE_OPTIONS.values(), *SERVER_OPTIONS.values()])(function)


def _declared(declared: list[Option]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def collect(**values: Any) -> Any:
            typed = {option.name: values.pop(option.name) for option in declared}
            options = {
                name: Given(value, "command line") for name, value in typed.items() if value not in (None, ())
            }
            return function(options=options, **values)

        command: Command = collect
        for option in reversed(declared):
            command = _click_parameter(option)(command)
        return command

    return decorate


def _click_parameter(option: Option) -> Callable[[Command], Command]:
    kind = DeclaredType(option)
    if option.positional:
        return click.argument(option.name, required=False, metavar=f"[{option.metavar}]", type=kind)
    settings: dict[str, Any] = {"help": _help_text(option), "section": option.component.capitalize()}
    if option.kind is bool:
        # None, not False: only a flag that was written counts as given.
        return click.option(option.flag, option.name, cls=SectionOption, is_flag=True, default=None, **settings)
    return click.option(
        option.flag,
        option.name,
        cls=SectionOption,
        type=kind,
        metavar=option.metavar,
        multiple=option.many,
        **settings,
    )


def _help_text(option: Option) -> str:
    plain = option.kind is bool or option.default in (None, ())
    return option.help if plain else f"{option.help}  [{option.default_text}]"
