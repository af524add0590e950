"""The random numbers behind the draws: uniform, independent, and fixed for ever by seed and position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lockstep.executor.draws import _mix, uniforms

pytestmark = pytest.mark.suite("cpu")


MASK = 2**64 - 1


def _mixed(value: int) -> int:
    """splitmix64 in whole numbers of any size, cut to 64 bits where it wraps."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _reference(seed: int, position: int) -> float:
    return (_mixed(_mixed(seed) ^ _mixed(position ^ 0x5851F42D4C957F2D)) >> 11) / 2**53


def _uniforms(seeds: Sequence[int] | int, positions: Sequence[int] | int) -> np.ndarray:
    """One of each for the other, where there is one."""
    return uniforms(*np.broadcast_arrays(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int64)))


def test_wraps_like_64_bit_integers() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1, 12345, 2**64 - 12345]
    positions = [0, 1, 77, 5, 2**20, 2**31]
    for position in positions:
        found = _uniforms(seeds, position)
        assert found.tolist() == [_reference(seed, position) for seed in seeds]
        assert (found >= 0.0).all() and (found < 1.0).all()
    found = _uniforms(seeds, positions)
    assert found.tolist() == [_reference(seed, at) for seed, at in zip(seeds, positions, strict=True)]


def test_the_mixing_is_splitmix64() -> None:
    """First outputs of splitmix64 from state 1234567, as its authors' C program prints them."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + step * gamma) % 2**64 for step in range(3)]
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _mix(np.array(states, dtype=np.uint64)).tolist() == outputs == [_mixed(state) for state in states]


@pytest.mark.parametrize("name", ["positions of one seed", "seeds at one position", "both moving together"])
def test_draws_are_uniform(name: str) -> None:
    count = 50_000
    moving = range(count)
    values = {
        "positions of one seed": _uniforms(42, moving),
        "seeds at one position": _uniforms(moving, 42),
        "both moving together": _uniforms(moving, moving),
    }[name]
    values.sort()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand; these draws never change.
    distance = np.abs(values - (np.arange(count) + 0.5) / count).max() + 0.5 / count
    assert distance < 1.95 / math.sqrt(count)


def test_neighbours_are_independent() -> None:
    """No correlation between neighbouring positions, neighbouring seeds, nor seeds that mirror positions."""
    side = 200
    table = np.array([_uniforms(seed, range(side)) for seed in range(side)])
    pairs = {
        "positions": (table[:, :-1], table[:, 1:]),
        "seeds": (table[:-1], table[1:]),
        "mirrored": (table[np.triu_indices(side, 1)], table.T[np.triu_indices(side, 1)]),
    }
    for name, (first, second) in pairs.items():
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size), name


def test_every_seed_bit_moves_half_of_the_output() -> None:
    positions = range(64)
    plain = (_uniforms(1, positions) * 2**53).astype(np.int64)
    for bit in range(64):
        flipped = (_uniforms(1 ^ (1 << bit), positions) * 2**53).astype(np.int64)
        flips = [int(bits).bit_count() for bits in plain ^ flipped]
        assert 24.5 < np.mean(flips) < 28.5, bit
