"""What the user said, and where; before anything is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config.components import OPTIONS
from lockstep.config.environment import from_environment
from lockstep.config.option import AUTO
from lockstep.core.errors import ConfigError, nearest

Source = Literal["default", "command line", "environment", "python", "model", "device", "derived"]
"""Who decided a value. model, device: a fact of it. derived: other options."""


@dataclass(frozen=True, slots=True)
class Given:
    """One value that a user wrote, with the place where."""

    value: Any
    source: Source


def gather(
    options: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    allowed: Iterable[str] = OPTIONS,
) -> dict[str, Given]:
    """Merges options that the caller gives over those of the environment, all checked.

    A value may be plain (its source is then "python") or already a Given. None and "auto" mean not given.
    Raises ConfigError for an unknown name, naming the nearest, and for a value that the option refuses.
    """
    allowed = list(allowed)
    merged = {name: Given(value, "environment") for name, value in from_environment(environ).items()}
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(f"unknown option {name!r}{nearest(name, allowed)}")
        entry = value if isinstance(value, Given) else Given(value, "python")
        if entry.value is not None:
            merged[name] = Given(OPTIONS[name].check(entry.value, name), entry.source)
    return {name: entry for name, entry in merged.items() if entry.value != AUTO}


def wanted(given: Mapping[str, Given], name: str) -> Any:
    """The value of an option that is needed before facts exist (model, device, revision): given or default."""
    return given[name].value if name in given else OPTIONS[name].default
