"""Finding a platform by name, or the best one that is here."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from lockstep.core.errors import ConfigError, nearest
from lockstep.platforms.base import Platform

_BUILT_IN = {
    "cuda": "lockstep.platforms.cuda:CudaPlatform",
    "cpu": "lockstep.platforms.cpu:CpuPlatform",
    "null": "lockstep.platforms.null:NullPlatform",
}
_AUTOMATIC = ("cuda", "cpu")
ENTRY_POINT_GROUP = "lockstep.platforms"


def platform_names() -> list[str]:
    """Built-in platforms, then those that installed packages offer through the entry point."""
    outside = sorted(
        point.name for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in _BUILT_IN
    )
    return [*_BUILT_IN, *outside]


def load_platform(name: str) -> Platform:
    """The platform called `name`. Raises ConfigError naming the nearest one when it is unknown."""
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        platform: Platform = getattr(importlib.import_module(module), attribute)()
        return platform
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            loaded: Platform = point.load()()
            return loaded
    known = platform_names()
    raise ConfigError(f"unknown device {name!r}{nearest(name, known)} (known: auto, {', '.join(known)})")


def pick_platform(name: str = "auto") -> Platform:
    """The named platform, or with "auto" the first that works here.

    Raises ConfigError when the named one cannot be used, with the reason.
    """
    if name != "auto":
        platform = load_platform(name)
        reason = platform.unavailable_reason()
        if reason is not None:
            raise ConfigError(f"--device {name} cannot be used: {reason}")
        return platform
    outside = [known for known in platform_names() if known not in _BUILT_IN]
    for candidate in (*outside, *_AUTOMATIC):
        platform = load_platform(candidate)
        if platform.unavailable_reason() is None:
            return platform
    raise ConfigError("no usable device was found")
