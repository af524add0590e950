"""The random numbers behind the draws: uniform, independent, and fixed for ever by seed and position."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lockstep.executor.draws import uniform, uniforms

pytestmark = pytest.mark.suite("cpu")


def _reference(seed: int, position: int) -> float:
    """The same mixing in numpy's wrapping 64-bit integers."""

    def mix(value: np.uint64) -> np.uint64:
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))

    with np.errstate(over="ignore"):
        mixed = mix(mix(np.uint64(seed % 2**64)) ^ mix(np.uint64(position ^ 0x5851F42D4C957F2D)))
    return int(mixed >> np.uint64(11)) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_wraps_like_64_bit_integers(seed: int) -> None:
    for position in (0, 1, 77, 2**20):
        assert uniform(seed, position) == _reference(seed, position)
        assert 0.0 <= uniform(seed, position) < 1.0


def test_many_at_once_are_the_same_numbers() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1, 12345, 2**64 - 12345]
    positions = [0, 1, 2**31, 77, 2**20, 5]
    found = uniforms(np.array(seeds, dtype=np.uint64), np.array(positions))
    assert found.tolist() == [uniform(seed, at) for seed, at in zip(seeds, positions, strict=True)]


def test_the_mixing_is_splitmix64() -> None:
    """First outputs of splitmix64 from state 1234567, as its authors' C program prints them."""
    from lockstep.executor.draws import _mix

    gamma = 0x9E3779B97F4A7C15
    outputs = [_mix((1234567 + step * gamma) % 2**64) for step in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("name", ["positions of one seed", "seeds at one position", "both moving together"])
def test_draws_are_uniform(name: str) -> None:
    count = 50_000
    draw = {
        "positions of one seed": lambda index: uniform(42, index),
        "seeds at one position": lambda index: uniform(index, 42),
        "both moving together": lambda index: uniform(index, index),
    }[name]
    values = np.sort([draw(index) for index in range(count)])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand; these draws never change.
    distance = np.abs(values - (np.arange(count) + 0.5) / count).max() + 0.5 / count
    assert distance < 1.95 / math.sqrt(count)


def test_neighbours_are_independent() -> None:
    """No correlation between neighbouring positions, neighbouring seeds, nor seeds that mirror positions."""
    side = 200
    table = np.array([[uniform(seed, position) for position in range(side)] for seed in range(side)])
    pairs = {
        "positions": (table[:, :-1], table[:, 1:]),
        "seeds": (table[:-1], table[1:]),
        "mirrored": (table[np.triu_indices(side, 1)], table.T[np.triu_indices(side, 1)]),
    }
    for name, (first, second) in pairs.items():
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size), name


def test_every_seed_bit_moves_half_of_the_output() -> None:
    for bit in range(64):
        flips = [
            (int(uniform(1, position) * 2**53) ^ int(uniform(1 ^ (1 << bit), position) * 2**53)).bit_count()
            for position in range(64)
        ]
        assert 24.5 < np.mean(flips) < 28.5, bit
