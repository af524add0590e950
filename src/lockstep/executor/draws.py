"""Random numbers that depend on a request's seed and a position alone, whatever shares the batch."""

from __future__ import annotations

import numpy as np

_OTHER_STREAM = np.uint64(0x5851F42D4C957F2D)
"""Keeps a seed's numbers apart from those of the position of equal value."""


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), of uint64 numbers, which wrap: every input bit changes
    every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) with 53 random bits, float64, for tokens at these positions of sequences with these seeds
    (uint64)."""
    mixed = _mix(_mix(seeds) ^ _mix(positions.astype(np.uint64) ^ _OTHER_STREAM))
    return (mixed >> np.uint64(11)) * 2.0**-53
