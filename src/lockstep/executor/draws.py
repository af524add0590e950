"""Random numbers that depend on a request's seed and a position alone, whatever shares the batch."""

from __future__ import annotations

import numpy as np

_MASK = 2**64 - 1
_OTHER_STREAM = 0x5851F42D4C957F2D
"""Keeps a seed's numbers apart from those of the position of equal value."""


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: np.ndarray) -> np.ndarray:
    """`_mix` of uint64 numbers, which wrap."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for the token at `position` of a sequence seeded with `seed`."""
    return (_mix(_mix(seed & _MASK) ^ _mix(position ^ _OTHER_STREAM)) >> 11) * 2.0**-53


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`uniform` of many seeds (uint64) and positions, float64."""
    mixed = _mix_all(_mix_all(seeds) ^ _mix_all(positions.astype(np.uint64) ^ np.uint64(_OTHER_STREAM)))
    return (mixed >> np.uint64(11)) * 2.0**-53
