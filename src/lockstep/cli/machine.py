"""What this machine brings to the work, in a phrase."""

from __future__ import annotations

from lockstep.config.environment import disabled_features
from lockstep.native import summary


def native_kernels() -> str:
    """Which instruction set the native kernels use here, or why there are none. Raises ConfigError when
    LOCKSTEP_DISABLE_FEATURES names something that is no processor feature."""
    return summary(disabled_features())
