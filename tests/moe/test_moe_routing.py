"""Routing and alignment against other implementations: transformers' routers, and loops over Python lists."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from lockstep.ops.contract import Kernel
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cpu")


def providers(op: str) -> list[Kernel]:
    return [kernel for kernel in kernels(op) if not kernel.platforms or "cpu" in kernel.platforms]


@pytest.mark.parametrize("kernel", providers("moe_topk_softmax"), ids=lambda kernel: kernel.provider)
@pytest.mark.parametrize("renormalise", [False, True])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4),
    top_k=st.integers(1, 5),
)
def test_softmax_routing_is_what_a_list_gives(
    kernel: Kernel, renormalise: bool, rows: list[list[int]], top_k: int
) -> None:
    """Small integers, so that nearly every row has ties, minus zero among them."""
    logits = torch.tensor([[-0.0 if x == 0 and i % 2 else float(x) for i, x in enumerate(row)] for row in rows])
    weights, ids = kernel.function(logits, top_k, renormalise)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    for row, row_weights, row_ids in zip(rows, weights.tolist(), ids.tolist(), strict=True):
        wanted = sorted(range(5), key=lambda expert: (-row[expert], expert))[:top_k]
        shares = [math.exp(row[expert]) for expert in wanted]
        total = sum(shares) if renormalise else sum(map(math.exp, row))
        assert row_ids == wanted
        assert row_weights == pytest.approx([share / total for share in shares], rel=1e-5)


@pytest.mark.parametrize("kernel", providers("moe_topk_sigmoid"), ids=lambda kernel: kernel.provider)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_k_groups"), [(64, 8, 8, 4), (32, 4, 4, 1), (16, 6, 1, 1)]
)
def test_sigmoid_routing_is_that_of_transformers(
    kernel: Kernel, renormalise: bool, experts: int, top_k: int, groups: int, top_k_groups: int
) -> None:
    config = DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=8,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=top_k_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    torch.manual_seed(5)
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(0, 0.2)
        logits, weights, ids = router(torch.randn(50, 16))
        found_weights, found_ids = kernel.function(
            logits, router.e_score_correction_bias, top_k, groups, top_k_groups, renormalise, 2.5
        )
    # transformers does not sort the chosen ones.
    order = ids.argsort(-1)
    found_order = found_ids.argsort(-1)
    assert torch.equal(found_ids.gather(-1, found_order).long(), ids.gather(-1, order))
    torch.testing.assert_close(
        found_weights.gather(-1, found_order), weights.gather(-1, order), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kernel", providers("moe_align"), ids=lambda kernel: kernel.provider)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_alignment_is_what_lists_give(kernel: Kernel, data: st.DataObject) -> None:
    num_experts, block_size = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 3, 4, 16]))
    top_k = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    ids = data.draw(st.lists(row, max_size=12))
    pairs, block_experts, num_rows = kernel.function(
        torch.tensor(ids, dtype=torch.int32).view(-1, top_k), num_experts, block_size
    )
    rows_of: dict[int, list[int]] = defaultdict(list)
    for pair, expert in enumerate(expert for token in ids for expert in token):
        rows_of[expert].append(pair)
    num_pairs = len(ids) * top_k
    wanted_pairs: list[int] = []
    wanted_experts: list[int] = []
    for expert in range(num_experts):
        rows = rows_of[expert] + [num_pairs] * (-len(rows_of[expert]) % block_size)
        wanted_pairs += rows
        wanted_experts += [expert] * (len(rows) // block_size)
    assert num_rows.tolist() == [len(wanted_pairs)]
    assert len(pairs) >= len(wanted_pairs) and len(block_experts) * block_size == len(pairs)
    assert pairs.tolist() == wanted_pairs + [num_pairs] * (len(pairs) - len(wanted_pairs))
    assert block_experts.tolist() == wanted_experts + [-1] * (len(block_experts) - len(wanted_experts))
    assert all(each.dtype == torch.int32 for each in (pairs, block_experts, num_rows))
