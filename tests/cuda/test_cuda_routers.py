"""Routers on an NVIDIA GPU beyond their contracts: every width of a row, many tokens, equal and nearly equal logits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lockstep.ops.registry import contracts, kernels

pytestmark = pytest.mark.suite("cuda-1", needs=("triton",), seconds=60)

TOKENS = 70_011  # No multiple of any tile, and enough for the programs of many rows.
CLEAR = 2.0**-18
"""Choices of sigmoid routing that lie so far apart are told apart whatever the rounding of a score."""


def triton_kernel(op: str) -> Any:
    return next(kernel for kernel in kernels(op) if kernel.provider == "triton").function


def with_lanes(monkeypatch: pytest.MonkeyPatch, op: str, lanes: int) -> None:
    programs = importlib.import_module(f"lockstep.ops.{op}.programs")
    monkeypatch.setattr(programs, "lanes_for", lambda num_tokens, num_experts: lanes)


def drawn_logits(experts: int, dtype: torch.dtype, seed: int, device: str) -> torch.Tensor:
    """A third each of any rows, rows with many equal logits, and rows that differ in their last bits alone."""
    generator = torch.Generator(device=device).manual_seed(seed)
    logits = torch.randn(TOKENS, experts, generator=generator, device=device) * 3
    logits[1::3] = logits[1::3].bfloat16().float()
    steps = torch.randint(-48, 48, logits[2::3].shape, generator=generator, device=device)
    logits[2::3] = (4 + steps * 2.0**-21) * logits[2::3, :1].sign()
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "lanes"), [(128, 2), (128, 4), (60, 8), (256, 2)])
def test_softmax_routing_of_many_tokens(
    experts: int,
    lanes: int,
    dtype: torch.dtype,
    seed: int,
    suite_platform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_lanes(monkeypatch, "moe_topk_softmax", lanes)
    logits = drawn_logits(experts, dtype, seed, suite_platform)
    weights, ids = triton_kernel("moe_topk_softmax")(logits, 8, True)
    wanted = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(ids.long(), wanted)
    shares = torch.softmax(logits.double().gather(-1, wanted), -1)
    torch.testing.assert_close(weights.double(), shares, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "lanes"),
    [(256, 8, 4, 2), (256, 8, 4, 4), (128, 1, 1, 2), (160, 8, 3, 4)],
)
def test_sigmoid_routing_of_many_tokens(
    experts: int,
    groups: int,
    top_groups: int,
    lanes: int,
    dtype: torch.dtype,
    seed: int,
    suite_platform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where choices are clear: most rows, all those with equal logits and biases a few units apart among them."""
    with_lanes(monkeypatch, "moe_topk_sigmoid", lanes)
    generator = torch.Generator(device=suite_platform).manual_seed(seed)
    logits = torch.randn(TOKENS, experts, generator=generator, device=suite_platform).to(dtype)
    logits[::3] = 0
    order = torch.randperm(experts, generator=generator, device=suite_platform)
    bias = 1 + order * 2 * CLEAR
    rest = (8, groups, top_groups, True, 2.5)
    weights, ids = triton_kernel("moe_topk_sigmoid")(logits, bias, *rest)
    choice = torch.sigmoid(logits.double()) + bias.double()
    sums = choice.unflatten(-1, (groups, -1)).sort(-1).values[..., -2:].sum(-1)
    gaps = torch.cat([values.sort(-1).values.diff() for values in (choice, sums)], -1)
    is_clear = ((gaps == 0) | (gaps > CLEAR)).all(-1)
    assert int(is_clear.sum()) > TOKENS // 3 and bool(is_clear[::3].all())
    wanted_weights, wanted_ids = contracts()["moe_topk_sigmoid"].reference(logits, bias, *rest)
    assert torch.equal(ids[is_clear], wanted_ids[is_clear])
    torch.testing.assert_close(weights[is_clear], wanted_weights[is_clear], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("op", ["moe_topk_softmax", "moe_topk_sigmoid"])
def test_rows_with_no_numbers_leave_others_alone(op: str, seed: int, suite_platform: str) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(1000, 256, device=suite_platform)
    is_plain = torch.rand(1000, device=suite_platform) < 0.9
    kept = logits[is_plain].clone()
    logits[~is_plain] = logits[~is_plain].masked_fill(torch.rand(256, device=suite_platform) < 0.5, torch.nan)
    rest: tuple[Any, ...] = (8, True) if op == "moe_topk_softmax" else (None, 8, 8, 4, True, 1.0)
    weights, ids = triton_kernel(op)(logits, *rest)
    alone_weights, alone_ids = triton_kernel(op)(kept, *rest)
    assert bool(((ids >= 0) & (ids < 256)).all())
    assert torch.equal(ids[is_plain], alone_ids) and torch.equal(weights[is_plain], alone_weights)
