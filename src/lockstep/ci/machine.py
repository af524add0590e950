"""What this machine can run."""

from __future__ import annotations

from functools import cache

from lockstep.ci.project import Suite


@cache
def missing_devices(suite: Suite) -> str | None:
    """None when this machine has the devices of a suite, else one line that says what is needed and what is here.

    Raises ConfigError when the suite names a platform that does not exist.
    """
    from lockstep.platforms.registry import load_platform

    platform = load_platform(suite.platform)
    needed = f"needs {suite.devices} {suite.platform} device{'s' if suite.devices != 1 else ''}"
    reason = platform.unavailable_reason()
    if reason is not None:
        return f"{needed}, this machine has none: {reason}"
    here = platform.capabilities().num_devices
    return None if here >= suite.devices else f"{needed}, this machine has {here}"


@cache
def missing_capability(platform: str, needs: tuple[str, ...]) -> str | None:
    """None when the platform's device has every capability, else which it lacks. The platform must be usable here."""
    from lockstep.platforms.registry import load_platform

    device = load_platform(platform).capabilities()
    lacking = [need for need in needs if not device.has(need)]
    return f"needs {', '.join(lacking)}, which {device.device_name} lacks" if lacking else None
