"""The references against maths written another way, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lockstep.ops.add_rms_norm.reference import add_rms_norm
from lockstep.ops.gelu_and_mul.reference import gelu_and_mul
from lockstep.ops.kv_store.reference import kv_store
from lockstep.ops.layer_norm.reference import layer_norm
from lockstep.ops.registry import kernels
from lockstep.ops.rms_norm.reference import rms_norm
from lockstep.ops.rope.reference import rope
from lockstep.ops.silu_and_mul.reference import silu_and_mul
from lockstep.ops.top_k_top_p_sample.reference import top_k_top_p_sample
from lockstep.ops.var_rms_norm.reference import var_rms_norm

pytestmark = pytest.mark.suite("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    print("seed 7")
    return torch.Generator().manual_seed(7)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=3e-6, atol=3e-6)


def test_norms(generator: torch.Generator) -> None:
    x, residual = (torch.randn(3, 5, 48, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(48, generator=generator) for _ in range(2))
    wide, gain = x.double().numpy(), weight.double().numpy()

    def by_root_of(squares: np.ndarray) -> np.ndarray:
        return np.asarray(wide * gain / np.sqrt(squares.mean(-1, keepdims=True) + 1e-5))

    close(rms_norm(x, weight, 1e-5), by_root_of(wide**2))
    close(var_rms_norm(x, weight, 1e-5, 20), by_root_of(wide[..., :20] ** 2))
    normed, total = add_rms_norm(x - residual, residual, weight, 1e-5)
    close(total, wide)
    close(normed, by_root_of(wide**2))
    centred = wide - wide.mean(-1, keepdims=True)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    close(layer_norm(x, weight, bias, 1e-5), centred / deviation * gain + bias.double().numpy())
    close(layer_norm(x, None, None, 1e-5), centred / deviation)


def test_a_norm_of_gemma_keeps_the_digits_of_its_weight(generator: torch.Generator) -> None:
    """1 + w in bfloat16 has steps of 2^-7; a weight that was stored as w near zero knows better."""
    x = torch.randn(4, 64, generator=generator).bfloat16()
    stored = torch.full((64,), 0.003).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (64,), 1 + stored.double(), 1e-6)
    kept = rms_norm(x, stored.float() + 1, 1e-6)
    lost = rms_norm(x, stored + 1, 1e-6)
    assert torch.equal(kept, exact.bfloat16()) and not torch.equal(lost, kept)


def test_gated_activations(generator: torch.Generator) -> None:
    x = torch.randn(4, 2 * 33, generator=generator) * 3
    gate, up = np.split(x.double().numpy(), 2, axis=-1)
    normal_below = np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(gate)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    close(silu_and_mul(x), gate / (1 + np.exp(-gate)) * up)
    close(gelu_and_mul(x, False), gate * normal_below * up)
    close(gelu_and_mul(x, True), gate * (1 + tanh) / 2 * up)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_complex_numbers(generator: torch.Generator, interleaved: bool) -> None:
    """A pair is a complex number; its turn is a product with cos + i sin. The rest is not touched."""
    x = torch.randn(3, 2, 20, generator=generator)
    angles = torch.rand(3, 8, generator=generator) * 6
    found = rope(x, angles.cos(), angles.sin(), torch.float32, interleaved)
    wide = x.double().numpy()
    first, second = (wide[..., 0:16:2], wide[..., 1:16:2]) if interleaved else (wide[..., :8], wide[..., 8:16])
    turned = (first + 1j * second) * np.exp(1j * angles.double().numpy())[:, None]
    expected = wide.copy()
    if interleaved:
        expected[..., 0:16:2], expected[..., 1:16:2] = turned.real, turned.imag
    else:
        expected[..., :8], expected[..., 8:16] = turned.real, turned.imag
    close(found, expected)


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_a_step_of_padding_alone_writes_nothing(provider: str) -> None:
    kernel = next(kernel for kernel in kernels("kv_store") if kernel.provider == provider)
    pools = [torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8)]
    new = torch.full((5, 2, 8), torch.nan)
    kernel.function(new, new, *pools, torch.full((5,), -1))
    assert all(torch.equal(pool, torch.ones(2, 3, 4, 8)) for pool in pools)


def test_slots_count_through_pages() -> None:
    pool = torch.zeros(1, 3, 4, 1)
    new = torch.arange(1.0, 4.0).view(3, 1, 1)
    kv_store(new, new, pool, pool.clone(), torch.tensor([0, 11, 6]))
    assert pool.flatten().nonzero().flatten().tolist() == [0, 6, 11] and pool[0, 1, 2, 0] == 3


def by_hand(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, draw: float) -> int:
    """One row of the sampler, a token at a time."""
    most = max(row)
    weights = {token: math.exp((score - most) / temperature) for token, score in enumerate(row)}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    left = order[:top_k] if top_k > 0 else order
    mass, before, kept = sum(weights[token] for token in left), 0.0, []
    for token in left:
        if before < top_p * mass and weights[token] >= min_p * weights[order[0]]:
            kept.append(token)
        before += weights[token]
    if top_k <= 0 and top_p == 1 and min_p == 0:
        kept = list(weights)
    target = draw * sum(weights[token] for token in kept)
    for token in kept:
        target -= weights[token]
        if target < 0:
            return token
    return kept[-1]


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_sampling_by_hand(generator: torch.Generator, provider: str) -> None:
    sample = next(kernel for kernel in kernels("top_k_top_p_sample") if kernel.provider == provider).function
    rows = 300
    logits = (torch.randn(rows, 40, generator=generator) * 4).round() / 2  # many equal scores
    temperature = 0.3 + torch.rand(rows, generator=generator)
    on = torch.rand(3, rows, generator=generator) < 0.5
    top_k = torch.where(on[0], torch.randint(1, 40, (rows,), generator=generator), 0)
    top_p = torch.where(on[1], torch.rand(rows, generator=generator), 1.0)
    min_p = torch.where(on[2], torch.rand(rows, generator=generator) / 2, 0.0)
    draw = torch.rand(rows, generator=generator, dtype=torch.float64)
    found = sample(logits, temperature, top_k, top_p, min_p, draw).tolist()
    columns = (each.tolist() for each in (logits, temperature, top_k, top_p, min_p, draw))
    assert found == [by_hand(*arguments) for arguments in zip(*columns, strict=True)]


def test_draws_follow_the_weights() -> None:
    """Evenly spaced draws give each token its share, to one draw."""
    weights = torch.tensor([0.5, 0.125, 0.25, 0.125])
    num = 8000
    arguments = (weights.log().repeat(num, 1), torch.ones(num), torch.zeros(num, dtype=torch.int64))
    draws = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    for top_p, shares in ((1.0, weights), (0.7, torch.tensor([2 / 3, 0, 1 / 3, 0]))):
        ids = top_k_top_p_sample(*arguments, torch.full((num,), top_p), torch.zeros(num), draws)
        counts = torch.bincount(ids, minlength=4)
        assert torch.all((counts - shares * num).abs() <= 1), counts
