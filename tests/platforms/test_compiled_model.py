"""A whole tiny model, traced in one piece: the same bits and the same kernels as eager."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.attention.backend import Span
from lockstep.attention.torch_backend import TorchBackend
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext
from lockstep.models.llm.llama import LlamaModel
from lockstep.models.loading.sources import RandomWeights
from lockstep.ops.library import TraceableSelector, kernels_called
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu")

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
}
PAGE_SIZE, NUM_TOKENS = 4, 6


def built(platform_name: str, selector: type[KernelSelector]) -> tuple[LlamaModel, Build]:
    platform = load_platform(platform_name)
    kernels = selector(platform.capabilities(), platform.kernel_preference)
    device = platform.device()
    build = Build(Mesh.solo(), device, torch.float32, torch.float32, RandomWeights(3), kernels, 64, PAGE_SIZE)
    return LlamaModel.make(build, CONFIG), build


def context(build: Build) -> ForwardContext:
    """A prompt of NUM_TOKENS in two pages of an empty pool."""
    pool = KVPool(
        tuple(build.kv_layers),
        num_pages=2,
        page_size=PAGE_SIZE,
        dtype=torch.float32,
        allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=build.device),
    )
    attention, rows = TorchBackend(), torch.arange(NUM_TOKENS, device=build.device)
    spans = [Span(0, NUM_TOKENS, [1, 0])]
    plan = attention.plan(spans, page_size=PAGE_SIZE, windows=build.windows, device=build.device)
    return ForwardContext(rows, (rows + PAGE_SIZE) % (2 * PAGE_SIZE), attention, plan, pool)


@pytest.mark.parametrize("platform", ["cpu", "sim"])
def test_a_model_compiles_in_one_piece(platform: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return aot_eager(module, examples)

    torch._dynamo.reset()
    with torch.inference_mode():
        plain, plain_build = built(platform, KernelSelector)
        traced, traced_build = built(platform, TraceableSelector)
        compiled = torch.compile(traced.forward, backend=backend, fullgraph=True)
        token_ids = torch.arange(NUM_TOKENS, device=plain_build.device)
        expected = plain.forward(context(plain_build), token_ids).cpu()
        assert torch.equal(compiled(context(traced_build), token_ids).cpu(), expected)
    names = [f"{each.op}_{each.kernel.provider}" for each in traced_build.kernels.bindings]
    assert names == [f"{each.op}_{each.kernel.provider}" for each in plain_build.kernels.bindings]
    # The head is no part of the forward.
    assert len(graphs) == 1 and Counter(kernels_called(graphs[0].graph)) == Counter(names[:-1])
