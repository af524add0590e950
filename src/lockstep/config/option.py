"""One option: how it is declared in a component, written by a user, and checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from lockstep.core.errors import ConfigError, nearest

AUTO: Final = "auto"
"""What a user writes to leave a choice to the resolver. It never appears in a resolved component."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_ARTICLE = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_METAVAR = {int: "N", float: "X", str: "TEXT", bool: ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Everything known about one option; derived from its field in a component.

    `kind` is the type of one value. `optional` options may be None; `many` options may be repeated and hold a
    tuple. `low` and `high` are inclusive, unless `exclusive`. A `secret` value is never shown.
    """

    name: str
    component: str
    kind: type
    default: Any
    help: str
    flag: str
    metavar: str
    optional: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()
    env: str | None = None
    low: float | None = None
    high: float | None = None
    exclusive: bool = False
    secret: bool = False
    positional: bool = False

    @property
    def has_auto(self) -> bool:
        """True when the resolver decides unless the user does."""
        return bool(self.default == AUTO)

    @property
    def default_text(self) -> str:
        """The default as a reader of the help or of the reference page should see it."""
        if self.kind is bool:
            return "off" if not self.default else "on"
        if self.default is None or self.default == ():
            return "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def parse(self, text: str, written_as: str) -> Any:
        """One value from the command line or the environment; `written_as` is the name to use in an error.

        Raises ConfigError.
        """
        if self.has_auto and text == AUTO:
            return AUTO
        try:
            value = self._from_text(text)
        except ValueError:
            raise self._refuse(text, written_as) from None
        return self._checked_one(value, written_as)

    def check(self, value: Any, written_as: str) -> Any:
        """A value given in Python, as it will be stored. Raises ConfigError."""
        if self.has_auto and value == AUTO:
            return AUTO
        if not self.many:
            return self._checked_one(value, written_as)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{written_as} takes a list of texts, not {value!r}")
        return tuple(self._checked_one(item, written_as) for item in value)

    def _from_text(self, text: str) -> Any:
        if self.kind is not bool:
            return self.kind(text)
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(text)
        return text.lower() in _TRUE

    def _checked_one(self, value: Any, written_as: str) -> Any:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise self._refuse(value, written_as)
        if self.choices and value not in self.choices:
            raise self._refuse(value, written_as)
        if self._out_of_range(value):
            raise self._refuse(value, written_as)
        return value

    def _out_of_range(self, value: Any) -> bool:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if self.kind not in (int, float) or (self.low is None and self.high is None):
            return False
        return not (low < value < high if self.exclusive else low <= value <= high)

    def _refuse(self, value: Any, written_as: str) -> ConfigError:
        hint = nearest(value, self.accepted) if isinstance(value, str) else ""
        return ConfigError(f"{written_as} takes {self.expected}, not {value!r}{hint}")

    @property
    def accepted(self) -> tuple[str, ...]:
        """The names that may be written, for an option with choices."""
        return (AUTO, *self.choices) if self.has_auto and self.choices else self.choices

    @property
    def expected(self) -> str:
        """What a value must be, in words: "an integer from 1 to 65535", "one of auto, off"."""
        if self.choices:
            return f"one of {', '.join(self.accepted)}"
        text = _ARTICLE[self.kind]
        if self.exclusive:
            text += f" above {self.low:g}" + (f" and below {self.high:g}" if self.high is not None else "")
        elif self.low is not None and self.high is not None:
            text += f" from {self.low:g} to {self.high:.0f}"
        elif self.low is not None:
            text += f" from {self.low:g} up"
        return text + (f" or {AUTO}" if self.has_auto else "")


def option(
    default: Any,
    *,
    help: str,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    env: str | None = None,
    low: float | None = None,
    high: float | None = None,
    exclusive: bool = False,
    secret: bool = False,
    positional: bool = False,
) -> Any:
    """Declares one option as a dataclass field.

    The field's annotation is the type of the *resolved* value; an option whose default is AUTO therefore has no
    default there, and the resolver must supply one. `help` is one or two sentences without a final default.
    """
    declared: dict[str, Any] = dict(
        default=default,
        help=help,
        flag=flag,
        choices=choices,
        metavar=metavar,
        env=env,
        low=low,
        high=high,
        exclusive=exclusive,
        secret=secret,
        positional=positional,
    )
    if default == AUTO:
        return dataclasses.field(repr=not secret, metadata=declared)
    return dataclasses.field(default=default, repr=not secret, metadata=declared)


def options_of(component: str, declaration: type) -> Iterator[Option]:
    """The options that a component declares, in the order of their fields."""
    hints = typing.get_type_hints(declaration)
    for field in dataclasses.fields(declaration):
        declared = dict(field.metadata)
        kind, optional, many = _shape(hints[field.name])
        flag = declared.pop("flag") or "--" + field.name.replace("_", "-")
        auto = (AUTO,) if declared["default"] == AUTO else ()
        names = "|".join((*auto, *declared["choices"])) if declared["choices"] else ""
        metavar = declared.pop("metavar") or names or _METAVAR[kind]
        yield Option(
            name=field.name,
            component=component,
            kind=kind,
            optional=optional,
            many=many,
            flag=flag,
            metavar=metavar,
            **declared,
        )


def _shape(hint: Any) -> tuple[type, bool, bool]:
    """(type of one value, may be None, may repeat) of an annotation such as ``int | None``."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], False, True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (kind,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return kind, True, False
    return hint, False, False
