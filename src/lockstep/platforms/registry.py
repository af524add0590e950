"""Finding a platform by name, or the best one that is here."""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import EntryPoint, entry_points

from lockstep.core.errors import ConfigError, nearest
from lockstep.platforms.base import Platform, PlatformError

_BUILT_IN = {
    "cuda": "lockstep.platforms.cuda:CudaPlatform",
    "rocm": "lockstep.platforms.rocm:RocmPlatform",
    "musa": "lockstep.platforms.musa:MusaPlatform",
    "cpu": "lockstep.platforms.cpu:CpuPlatform",
    "null": "lockstep.platforms.null:NullPlatform",
    "sim": "lockstep.platforms.sim:SimPlatform",
}
_AUTOMATIC = ("cuda", "rocm", "musa", "cpu")
ENTRY_POINT_GROUP = "lockstep.platforms"

_LOG = logging.getLogger("lockstep.platforms")


def platform_names() -> list[str]:
    """Built-in platforms, then those that installed packages offer through the entry point."""
    return [*_BUILT_IN, *names_from_outside()]


def names_from_outside() -> list[str]:
    """Platforms of other packages. Each serves whoever names it, and is never picked for anybody."""
    return sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in _BUILT_IN)


def load_platform(name: str) -> Platform:
    """The platform called `name`. Raises ConfigError naming the nearest one when it is unknown.

    Raises PlatformError when the package that offers it cannot be imported, or offers something else.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        platform: Platform = getattr(importlib.import_module(module), attribute)()
        return platform
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return _from_outside(point)
    known = platform_names()
    raise ConfigError(f"unknown device {name!r}{nearest(name, known)} (known: auto, {', '.join(known)})")


def _from_outside(point: EntryPoint) -> Platform:
    package = point.dist.name if point.dist is not None else point.value
    try:
        offered = point.load()
    except Exception as error:  # it is another package's module: nothing is known of what it may raise
        raise PlatformError(
            f"platform {point.name!r} of package {package} cannot be imported: {error}"
        ) from error
    if not (isinstance(offered, type) and issubclass(offered, Platform)):
        raise PlatformError(
            f"platform {point.name!r} of package {package} is {offered!r}, not a Platform class"
        )
    if offered.name != point.name:
        raise PlatformError(f"package {package} offers platform {offered.name!r} under the name {point.name!r}")
    return offered()


def platform_of_device_type(device_type: str) -> Platform:
    """The platform whose devices torch calls `device_type`. Raises ConfigError naming the nearest when none has it."""
    types: list[str] = []
    for name in platform_names():
        platform = load_platform(name)
        if platform.device_type == device_type:
            return platform
        types.append(platform.device_type)
    raise ConfigError(
        f"no platform has devices of type {device_type!r}{nearest(device_type, types)} "
        f"(known: {', '.join(dict.fromkeys(types))})"
    )


def pick_platform(name: str = "auto", option: str = "--device") -> Platform:
    """The named platform, or with "auto" the first of cuda, rocm, musa and cpu that works here.

    One that seems to be here and is broken is passed over with a warning. Raises ConfigError when the named one cannot
    be used, with the reason; `option` is where it was named.
    """
    if name != "auto":
        platform = load_platform(name)
        reason = platform.unavailable_reason()
        if reason is not None:
            raise ConfigError(f"{option} {name} cannot be used: {reason}")
        return platform
    for candidate in _AUTOMATIC:
        platform = load_platform(candidate)
        reason = platform.unavailable_reason()
        if reason is None:
            return platform
        if platform.is_broken():
            _LOG.warning("%s is passed over: %s", candidate, reason)
    raise ConfigError("no usable device was found")
