"""Eager, recorded as a graph, or compiled: a step of single tokens runs the same kernels and gives the same scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from tiny_llm import make_tiny, open_tiny

from lockstep.attention.backend import Span
from lockstep.attention.choice import choose_backend
from lockstep.attention.paged_backend import PagedBackend
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.loading.sources import RandomWeights
from lockstep.models.registry import model_class
from lockstep.ops.library import TraceableSelector, kernels_called
from lockstep.ops.selection import KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cuda-1", seconds=120)

PAGE_SIZE, NUM_ROWS, NUM_KEYS = 16, 5, 40
PAGES = -(-NUM_KEYS // PAGE_SIZE)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {**SIZES, "architectures": ["LlamaForCausalLM"]},
    "experts": {
        **SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    },
}
TOLERANCE = 0.02
"""Of the largest score. A compiler may fuse what lies between the kernels, and then rounds to bfloat16 less often."""


class Step:
    """A model, and one step of NUM_ROWS sequences that already have NUM_KEYS - 1 keys each.

    With `fresh`, a kernel that makes heads ready, stores and attends is bound where this device has one.
    """

    def __init__(self, config: dict[str, Any], selector: type[KernelSelector], *, fresh: bool) -> None:
        platform = load_platform("cuda")
        capabilities, device = platform.capabilities(), platform.device()
        bfloat16, kernels = torch.bfloat16, selector(capabilities, platform.kernel_preference)
        self.build = Build(Mesh.solo(), device, bfloat16, bfloat16, RandomWeights(3), kernels, 64, PAGE_SIZE)
        self.model = model_class(config).make(self.build, config)
        preference, signature = platform.attention_preference, self.build.attention_signature
        self.attention, self.attends = choose_backend(
            "auto",
            kernels,
            preference,
            signature,
            fresh_signature=self.build.fresh_signature if fresh else None,
        )
        assert isinstance(self.attention, PagedBackend) and self.attention.why_no_graphs is None
        self.pool = KVPool(
            tuple(self.build.kv_layers),
            num_pages=NUM_ROWS * PAGES,
            page_size=PAGE_SIZE,
            dtype=bfloat16,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device),
        )
        generator = torch.Generator().manual_seed(1)
        for layer in self.pool.layers:
            for tensor in (layer.k_NPSH, layer.v_NPSH):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        num_keys = torch.full((NUM_ROWS,), NUM_KEYS, dtype=torch.int32, device=device)
        plan = self.attention.fixed_plan(num_keys, num_pages=PAGES, page_size=PAGE_SIZE)
        pages = [list(range(row * PAGES, (row + 1) * PAGES)) for row in range(NUM_ROWS)]
        self.attention.refill(plan, [Span(NUM_KEYS - 1, 1, each) for each in pages])
        positions = torch.full((NUM_ROWS,), NUM_KEYS - 1, device=device)
        slots = torch.arange(NUM_ROWS, device=device) * PAGES * PAGE_SIZE + positions
        self.context = ForwardContext(positions, slots, self.attention, plan, self.pool)
        self.token_ids = torch.arange(NUM_ROWS, device=device) * 7 + 1

    @property
    def kernels(self) -> list[tuple[str, str, str]]:
        """Every call site with its operator and kernel."""
        sites = (*self.build.kernels.bindings, *self.attends)
        return [(each.where, each.op, each.kernel.provider) for each in sites]

    @property
    def called(self) -> set[str]:
        """Kernels that a step needs in which every sequence has a single token, and keys of its own."""
        bound = {(op, provider) for _, op, provider in self.kernels if provider != "parts"}
        unused = {"attention_decode_shared", "attention_extend", "linear_choose_greedy"}
        if "norm_rope_attention_decode" in dict(bound):
            unused |= {"norm_rope_store", "attention_decode"}
        return {f"{op}_{provider}" for op, provider in bound if op not in unused}

    def scores(self, ctx: ForwardContext, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.logits(self.model.forward(ctx, Tokens(token_ids)))

    def run(self, function: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        return (function or self.scores)(self.context, self.token_ids)


@pytest.mark.parametrize("fresh", [False, True], ids=["ready heads", "fresh heads"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_kernels_and_scores(name: str, compiler: str, fresh: bool) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def watched(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend(compiler)(module, examples)

    with torch.inference_mode():
        plain, traced = (
            Step(CONFIGS[name], selector, fresh=fresh) for selector in (KernelSelector, TraceableSelector)
        )
        assert traced.kernels == plain.kernels
        eager = plain.run().clone()
        graph = load_platform("cuda").new_graph()
        with graph.capture():
            recorded = plain.run()
        recorded.zero_()
        graph.replay()
        compiled = traced.run(torch.compile(traced.scores, backend=watched, fullgraph=True))
        torch.cuda.synchronize()
        assert set(kernels_called(graphs[0].graph)) == plain.called
        assert torch.equal(recorded, eager)
        accepted = TOLERANCE * float(eager.abs().max())
        assert float((compiled - eager).abs().max()) < accepted
        # Other tokens must show.
        plain.token_ids += 1
        assert float((plain.run() - eager).abs().max()) > 3 * accepted


def test_engines_report_the_same_kernels_with_graphs_and_without(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    reports = []
    for graphs in ("full", "off"):
        with open_tiny(tmp_path, device="cuda", dtype="bfloat16", graphs=graphs) as llm:
            report = llm.kernel_report()
        reports.append([(each.op, each.where, each.kernel.provider, each.why) for each in report])
    assert reports[0] == reports[1] and len(reports[0]) > 10
