"""Tokens chosen on the device: held in a graph, drawn from whole vocabularies, and never looked at on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lockstep.ops.argmax.programs import search
from lockstep.ops.argmax.reference import argmax
from lockstep.ops.top_k_top_p_sample.programs import sample
from lockstep.ops.top_k_top_p_sample.reference import top_k_top_p_sample

pytestmark = pytest.mark.suite("cuda-1", seconds=60)

VOCAB_SIZE = 151936
Limits = tuple[torch.Tensor, ...]


def rows_of_all_kinds(num_rows: int, seed: int) -> tuple[torch.Tensor, Limits]:
    """Scores of three widths and every mix of filters, on the device."""
    g = torch.Generator("cuda").manual_seed(seed)

    def random() -> torch.Tensor:
        return torch.rand(num_rows, generator=g, device="cuda")

    width_R = torch.tensor([0.5, 3.0, 8.0], device="cuda").repeat(num_rows)[:num_rows]
    logits_RV = torch.randn(num_rows, VOCAB_SIZE, generator=g, device="cuda") * width_R[:, None]
    top_k_R = torch.where(random() < 0.5, 1 + (random() * 60).long(), 0)
    top_p_R = torch.where(random() < 0.5, random(), 1.0)
    min_p_R = torch.where(random() < 0.5, random() / 4, 0.0)
    return logits_RV, (0.3 + random(), top_k_R, top_p_R, min_p_R, random().double())


def watched(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The call in the mode in which torch raises where the host would wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_rows", [1, 96, 300])
def test_whole_vocabularies(seed: int, num_rows: int) -> None:
    logits_RV, limits = rows_of_all_kinds(num_rows, seed)
    found_R = watched(lambda: sample(logits_RV, *limits))
    expected_R = torch.cat(
        [
            top_k_top_p_sample(logits_RV[at : at + 32], *(limit[at : at + 32] for limit in limits))
            for at in range(0, num_rows, 32)
        ]
    )
    # Random limits lie within rounding of a token's share about once in ten thousand rows.
    assert int((found_R != expected_R).sum()) <= 1
    assert torch.equal(sample(logits_RV.flip(0), *(limit.flip(0) for limit in limits)).flip(0), found_R)


def test_a_graph_holds_the_draw(seed: int) -> None:
    logits_RV, limits = rows_of_all_kinds(64, seed)
    sample(logits_RV, *limits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_R = sample(logits_RV, *limits)
    for again in range(2):
        others_RV, other_limits = rows_of_all_kinds(64, seed + 1 + again)
        for held, fresh in zip((logits_RV, *limits), (others_RV, *other_limits), strict=True):
            held.copy_(fresh)
        graph.replay()
        assert torch.equal(found_R, sample(others_RV, *other_limits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_a_vocabulary(seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(seed)
    logits_RV = torch.randn(256, VOCAB_SIZE, generator=g, device="cuda").to(dtype)
    logits_RV[3, [70000, 140000]] = torch.nan
    logits_RV[4] = -torch.inf
    best_R, token_ids_R = search(logits_RV)
    wanted_R, places_R = argmax(logits_RV.cpu())
    assert torch.equal(token_ids_R.cpu(), places_R)
    assert torch.equal(best_R.cpu().nan_to_num(99.0), wanted_R.nan_to_num(99.0))
    ones_R = torch.ones(256, device="cuda")
    drawn_R = sample(logits_RV, ones_R, ones_R.long(), ones_R, ones_R - 1, ones_R.double() / 2)
    assert torch.equal(drawn_R.cpu(), places_R), "top-k 1 is the greedy choice"
