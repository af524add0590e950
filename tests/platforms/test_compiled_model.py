"""Whole tiny models, traced in one piece: the same bits and the same kernels as eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.attention.backend import AttentionBackend, Span
from lockstep.attention.choice import choose_backend
from lockstep.attention.torch_backend import TorchBackend
from lockstep.engine.llm import LLM
from lockstep.engine.loading import bind_model, new_build
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderModel
from lockstep.models.loading.sources import RandomWeights, ShapeWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.models.registry import model_class
from lockstep.ops import selection
from lockstep.ops.library import TraceableSelector, kernels_called
from lockstep.ops.registry import kernels
from lockstep.ops.selection import Binding, KernelSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.registry import load_platform

pytestmark = pytest.mark.suite("cpu", seconds=60)

PAGE_SIZE, NUM_PAGES, NUM_TOKENS = 4, 2, 6
PROMPT = Span(0, NUM_TOKENS, [1, 0])
SINGLE_TOKENS = (Span(2, 1, [1]), Span(3, 1, [0]))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {**SIZES, "architectures": ["LlamaForCausalLM"]},
    # The embedding looks rows up in the weight that the head's product reads.
    "llama, tied": {**SIZES, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "experts": {
        **SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
}


@dataclass(frozen=True)
class Built:
    """A model whose every operator is bound, and the scores of a prompt of NUM_TOKENS in an empty pool of NUM_PAGES."""

    model: DecoderModel
    build: Build
    attention: AttentionBackend
    attends: tuple[Binding, ...]

    @classmethod
    def on(
        cls,
        platform_name: str,
        config: dict[str, Any],
        dtype: torch.dtype,
        selector: type[KernelSelector],
        attends_by: tuple[str, ...] = (),
    ) -> Built:
        platform = load_platform(platform_name)
        capabilities, device = platform.capabilities(), platform.device()
        kernels = selector(capabilities, platform.kernel_preference)
        build = Build(Mesh.solo(), device, dtype, dtype, RandomWeights(3), kernels, 64, PAGE_SIZE)
        model = model_class(config).make(build, config)
        preference, fresh = attends_by or platform.attention_preference, build.fresh_signature
        signature = build.attention_signature
        backend, attends = choose_backend("auto", kernels, preference, signature, fresh_signature=fresh)
        return cls(model, build, backend, attends)

    @property
    def kernels(self) -> list[tuple[str, str, str]]:
        """Every call site with its operator and kernel."""
        sites = (*self.build.kernels.bindings, *self.attends)
        return [(each.where, each.op, each.kernel.provider) for each in sites]

    def scores(self, forward: Callable[..., torch.Tensor], spans: Sequence[Span] = (PROMPT,)) -> torch.Tensor:
        device = self.build.device
        pool = KVPool(
            tuple(self.build.kv_layers),
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            dtype=self.build.kv_dtype,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device),
        )
        places = [(span, at) for span in spans for at in range(span.start, span.num_kv_tokens)]
        slots = [span.page_ids[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for span, at in places]
        rows, slots_T = (torch.tensor(each, device=device) for each in ([at for _, at in places], slots))
        plan = self.attention.plan(spans, page_size=PAGE_SIZE, windows=self.build.windows, device=device)
        return forward(ForwardContext(rows, slots_T, self.attention, plan, pool), rows).cpu()

    def forward(self, ctx: ForwardContext, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.logits(self.model.forward(ctx, Tokens(token_ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("platform", ["cpu", "sim"])
def test_a_model_compiles_in_one_piece(platform: str, name: str, dtype: torch.dtype) -> None:
    graphs: list[torch.fx.GraphModule] = []
    num_layers = SIZES["num_hidden_layers"]
    of_a_layer = (SIZES["num_key_value_heads"], NUM_PAGES, PAGE_SIZE, SIZES["head_dim"])

    def backend(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module)
        # Of two inputs in one storage, a compiler copies one that is written: all keys or values of a layer, each step.
        tensors = (each for each in examples if isinstance(each, torch.Tensor))
        layers = [each.shape for each in tensors if each.shape[-4:] == of_a_layer]
        assert layers == [(2 * num_layers, *of_a_layer)]
        return aot_eager(module, examples)

    torch._dynamo.reset()
    with torch.inference_mode():
        plain = Built.on(platform, CONFIGS[name], dtype, KernelSelector)
        traced = Built.on(platform, CONFIGS[name], dtype, TraceableSelector)
        assert traced.kernels == plain.kernels
        expected = plain.scores(plain.forward)
        compiled = torch.compile(traced.forward, backend=backend, fullgraph=True)
        assert torch.equal(traced.scores(compiled), expected)
    assert len(graphs) == 1
    # Every call site is called, and nothing else; torch's backend computes a prompt with torch's own operators.
    called = Counter(kernels_called(graphs[0].graph))
    bound = Counter(f"{op}_{provider}" for _, op, provider in traced.kernels)
    del bound[f"attention_decode_{traced.attends[0].kernel.provider}"]
    if isinstance(traced.attention, TorchBackend):
        del bound["attention_extend_torch"]
    assert called >= bound and set(called) == set(bound)


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_single_tokens_of_fresh_heads_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel makes heads ready, stores and attends, as in an eager step; beside longer spans it does not."""
    fused = {
        op: replace(kernels(op)[0], provider="together", platforms=frozenset({"cpu"}))
        for op in ("norm_rope_store", "norm_rope_attention_decode")
    }
    monkeypatch.setattr(
        selection, "kernels", lambda op: (*kernels(op), fused[op]) if op in fused else kernels(op)
    )
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return aot_eager(module, examples)

    torch._dynamo.reset()
    with torch.inference_mode():
        plain, traced = (
            Built.on("cpu", CONFIGS[name], torch.float32, selector, attends_by=("reference",))
            for selector in (KernelSelector, TraceableSelector)
        )
        for spans in (SINGLE_TOKENS, (SINGLE_TOKENS[0], Span(0, 2, [0]))):
            compiled = torch.compile(traced.forward, backend=backend, fullgraph=True)
            assert torch.equal(traced.scores(compiled, spans), plain.scores(plain.forward, spans))
    alone = f"attention_decode_{traced.attends[0].kernel.provider}"
    attending = ("norm_rope_attention_decode_together", "norm_rope_store_together", alone)
    counted = [Counter(kernels_called(module.graph)) for module in graphs]
    num_layers = SIZES["num_hidden_layers"]
    assert [[each[op] // num_layers for op in attending] for each in counted] == [[1, 0, 0], [0, 1, 1]]


def test_a_whole_decoder_is_bound_alike_and_leaves_nothing_to_compile() -> None:
    platform = load_platform("cpu")
    signature = {
        "dtype": torch.bfloat16,
        "pool_dtype": torch.bfloat16,
        "head_dim": 16,
        "inner_size": 96,
        "num_ranks": 1,
    }
    plain, traced = (
        selector(platform.capabilities(), platform.kernel_preference).bind_fused(
            "decoder_forward", "", signature
        )
        for selector in (KernelSelector, TraceableSelector)
    )
    assert plain is not None and traced is not None and traced.kernel is plain.kernel


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("platform", ["cpu", "sim"])
def test_a_model_is_bound_alike_whether_it_is_to_be_compiled_or_not(
    platform: str, dtype: str, tiny_llama: Path
) -> None:
    """Every call site of an engine, the sampler's too, against the same model bound for compiling."""
    with LLM(str(tiny_llama), device=platform, dtype=dtype, max_total_tokens=256) as llm:
        report, opened = llm.kernel_report(), llm._engine.opened
    mesh, weights = Mesh.shapes_only({"ep": 1, "tp": 1}, rank=0), ShapeWeights(FileWeights(opened.files))
    where = (load_platform("null").device(), mesh, weights, opened.platform)
    build = new_build(opened.config, *where, selector=TraceableSelector)
    bound = bind_model(build, opened.facts, opened.files.config, opened.config, opened.platform).bindings
    facts = [[(each.op, each.where, each.kernel.provider, each.why) for each in run] for run in (report, bound)]
    assert facts[0] == facts[1] and len(facts[0]) > 20
