"""Quantising values here against the `gguf` package, bit for bit, and against what rounding promises."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from lockstep.core.errors import ConfigError, ModelFileError
from lockstep.quantization.quantise import quantise
from lockstep.quantization.storage_types import storage_type

pytestmark = pytest.mark.suite("cpu", seconds=3)

NAMES = ("q4_0", "q8_0")
SEED = 20_261

Numbers = Callable[[np.random.Generator], np.ndarray]


def ties(draw: np.random.Generator) -> np.ndarray:
    """Multiples of a half step, so that most quotients lie between two integers, with both signs of the largest."""
    values = draw.integers(-16, 17, (64, 96)) / 2
    values[:, ::32] = draw.choice([-8.0, 8.0], (64, 3))
    return values


def eighth_ties(draw: np.random.Generator) -> np.ndarray:
    """Blocks whose largest is 127, so that halves are exact ties of eight bits."""
    values = draw.integers(-254, 255, (64, 96)) / 2
    values[:, ::32] = 127.0
    return values


def sparse(draw: np.random.Generator) -> np.ndarray:
    """Blocks of zeros, among others with one value."""
    values = np.zeros((64, 96))
    values[np.arange(0, 64, 2), draw.integers(0, 96, 32)] = draw.normal(size=32)
    return values


def all_sizes(draw: np.random.Generator) -> np.ndarray:
    """Blocks from where half precision has no scale left to where it nearly overflows."""
    return draw.normal(size=(64, 96)) * 10.0 ** np.linspace(-9, 4, 64)[:, None]


KINDS: dict[str, Numbers] = {
    "normal": lambda draw: draw.normal(size=(100, 1024)) * 0.02,
    "uniform": lambda draw: draw.uniform(-1, 1, (33, 320)),
    "ties": ties,
    "eighth ties": eighth_ties,
    "sparse": sparse,
    "all sizes": all_sizes,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_ggmls(name: str, kind: str) -> None:
    print(f"seed {SEED}")
    values_RC = KINDS[kind](np.random.default_rng(SEED)).astype(np.float32)
    with np.errstate(all="ignore"):
        packed_RB = gguf.quants.quantize(values_RC, gguf.GGMLQuantizationType[name.upper()])
    theirs = storage_type(name.upper()).unpack(torch.from_numpy(packed_RB))
    ours = quantise(torch.from_numpy(values_RC), name)
    assert ours.q.dtype == torch.int8 and ours.minimum is None
    assert torch.equal(ours.q, theirs.q)
    assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize(("name", "steps"), [("q4_0", 1.0), ("q8_0", 0.5)])
def test_no_value_moves_further_than_its_format_allows(name: str, steps: float) -> None:
    """Half a step of eight bits; of four bits a whole one, at the end that has one integer fewer. Scales are rounded
    to eleven bits, which may add up to 127 steps / 2048."""
    print(f"seed {SEED}")
    values = torch.from_numpy(np.random.default_rng(SEED).normal(size=(64, 256)))
    q, scale, _ = quantise(values, name)
    blocks, scales = q.double().view(64, -1, 32), scale.double()[..., None]
    away_in_steps = ((blocks * scales - values.view(64, -1, 32)) / scales).abs().max().item()
    assert 0.9 * steps < away_in_steps < steps + 127 / 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_any_type_in_many_pieces(dtype: torch.dtype) -> None:
    """More than one piece at a time, and the last one shorter: nothing depends on where they are cut."""
    values_RC = torch.randn(131, 1056, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    whole = quantise(values_RC, "q8_0")
    for row in (0, 61, 130):
        alone = quantise(values_RC[row : row + 1], "q8_0")
        assert torch.equal(alone.q[0], whole.q[row]) and torch.equal(alone.scale[0], whole.scale[row])


def test_what_cannot_be_quantised_is_named() -> None:
    with pytest.raises(ConfigError, match=r"to q4_0, q8_0, not to 'q4_1'; did you mean 'q4_0'"):
        quantise(torch.zeros(1, 32), "q4_1")
    with pytest.raises(ModelFileError, match="48 columns are not whole q8_0 blocks of 32"):
        quantise(torch.zeros(1, 48), "q8_0")
    for bad in (float("nan"), float("-inf"), 1e30):
        values = torch.zeros(2, 64)
        values[1, 40] = bad
        with pytest.raises(ModelFileError, match="not finite, or too large for q4_0"):
            quantise(values, "q4_0")
