"""What an NVIDIA Hopper says of itself, for tests that have none."""

from __future__ import annotations

from lockstep.core.capabilities import Capabilities


def hopper(*features: str) -> Capabilities:
    """One with these features."""
    return Capabilities(
        platform="cuda",
        device_type="cuda",
        device_name="a Hopper",
        num_devices=1,
        memory_bytes=1 << 36,
        features=frozenset(features),
    )
