"""Random numbers that depend on a request's seed and a position alone, whatever shares the batch."""

from __future__ import annotations

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for the token at `position` of a sequence seeded with `seed`."""
    return (_mix(_mix(seed & _MASK) ^ _mix(position ^ 0x5851F42D4C957F2D)) >> 11) * 2.0**-53
