"""Every model family in bfloat16 on an NVIDIA GPU: logits of known tokens, eager, by graphs and compiled.

They are compared with those of transformers for the same weights in float32. What is accepted derives from
transformers too: how far its own bfloat16 run is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, PAGE_SIZE, VARIANTS, Case, Logits
from teacher_forcing import TeacherForcedEngine

from lockstep.attention.backend import Span
from lockstep.core.step import StepPlan, StepResult
from lockstep.engine.loading import bind_model, new_build
from lockstep.engine.opening import open_for_running
from lockstep.kv.pool.pool import KVPool
from lockstep.layers.build import ForwardContext
from lockstep.layers.tokens import Tokens
from lockstep.models.loading.sources import StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.models.registry import model_classes
from lockstep.ops.library import TraceableSelector
from lockstep.parallel.mesh import Mesh
from lockstep.platforms.accelerator import CudaGraph

pytestmark = pytest.mark.suite("cuda-1", seconds=120)

LENGTHS = (1, 9, 24, 60, 140)
# Decoded from the start; shorter than a window and decoded across it; longer than a window; across pages.
NUM_PROMPT_TOKENS = (1, 5, 20, 40, 120)
CHUNK = 24
SIZES: Mapping[str, Any] = {"max_running_requests": 8, "chunked_prefill_size": 128}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "eager": {"graphs": "off", "extend_graphs": "off"},
    "graphs": {"graphs": "full", "extend_graphs": "piecewise"},
}
COMPILED_LENGTHS, NUM_COMPILED = (9, 24, 60, 140), 8
"""So many of each sequence's tokens are left to the compiled step."""

MUTANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "plain", {"rope_theta": 1.05e4}),
    ("LlamaForCausalLM", "plain", {"rms_norm_eps": 2e-4}),
    ("Qwen2ForCausalLM", "windows", {"sliding_window": 7}),
    ("Qwen3ForCausalLM", "plain", {"hidden_act": "gelu_pytorch_tanh"}),
    ("Gemma3ForCausalLM", "plain", {"sliding_window": 9}),
    ("Gemma3ForCausalLM", "plain", {"query_pre_attn_scalar": 160}),
    ("Gemma3ForCausalLM", "capped scores", {"attn_logit_softcapping": 50.0}),
    ("Qwen3MoeForCausalLM", "plain", {"norm_topk_prob": True}),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other take longer than the host's part of the work."""
    torch.set_num_threads(1)


def engine_of(case: Case, device: str, **options: Any) -> TeacherForcedEngine:
    return TeacherForcedEngine(case.path, device=device, probed=False, **case.options, **SIZES, **options)


def forced_logits(engine: TeacherForcedEngine, case: Case) -> Logits:
    return engine.logits(case.sequences, num_prompt_tokens=NUM_PROMPT_TOKENS, chunk=CHUNK)


@pytest.mark.suite("cpu")
def test_every_family_has_a_case() -> None:
    assert set(VARIANTS) == set(model_classes())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("architecture", "variant"), ALL)
def test_logits_are_those_of_float32_but_for_rounding(
    architecture: str, variant: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(architecture, variant, tmp_path, LENGTHS)
    engine = engine_of(case, "cuda", **WAYS[way])
    steps = watched_steps(engine, monkeypatch)
    assert 0 < case.error(forced_logits(engine, case)) < 1
    assert engine.rank.pool is not None
    of_single, of_longer = (2, len(engine.rank.pool.layers) + 1) if way == "graphs" else (0, 0)
    assert set(steps) == {(True, of_single), (False, of_longer)}


def watched_steps(engine: TeacherForcedEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether each step from now on has single tokens alone, and how many graphs it replayed, that of scores too."""
    steps: list[tuple[bool, int]] = []
    replayed: list[CudaGraph] = []
    replay, execute = CudaGraph.replay, engine.runner.execute

    def counted(graph: CudaGraph) -> None:
        replayed.append(graph)
        replay(graph)

    def watched(plan: StepPlan) -> StepResult:
        replayed.clear()
        result = execute(plan)
        if plan.slices:
            steps.append((plan.num_tokens == len(plan.slices), len(replayed)))
        return result

    monkeypatch.setattr(CudaGraph, "replay", counted)
    monkeypatch.setattr(engine.runner, "execute", watched)
    return steps


@pytest.mark.parametrize(("architecture", "variant", "wrong"), MUTANTS)
def test_the_tolerance_rejects_a_slightly_wrong_model(
    architecture: str, variant: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(architecture, variant, tmp_path, LENGTHS)
    engine = engine_of(case, "cuda", changed=wrong, **WAYS["eager"])
    assert case.error(forced_logits(engine, case)) > 2


class CompiledModel:
    """A saved model whose kernels are operators of torch.library, its steps of single tokens compiled."""

    @torch.inference_mode()
    def __init__(self, case: Case, device: str, compiler: str) -> None:
        files = {"model": str(case.path), "device": device, "max_total_tokens": 1024}
        opened = open_for_running({**files, **case.options})
        self._device = opened.platform.device()
        weights = StoredWeights(FileWeights(opened.files))
        where = (self._device, Mesh.solo(), weights, opened.platform)
        self._build = new_build(opened.config, *where, selector=TraceableSelector)
        settings = (opened.facts, opened.files.config, opened.config, opened.platform)
        bound = bind_model(self._build, *settings, compile_ahead=True)
        self._model, self._attention = bound.model, bound.attention
        self._pool = KVPool(
            tuple(self._build.kv_layers),
            num_pages=1024 // PAGE_SIZE,
            page_size=PAGE_SIZE,
            dtype=self._build.kv_dtype,
            allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=self._device),
        )
        self.graphs: list[torch.fx.GraphModule] = []

        def watched(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
            self.graphs.append(module)
            return torch._dynamo.lookup_backend(compiler)(module, examples)

        torch._dynamo.reset()
        self._compiled = torch.compile(self._scores, backend=watched, fullgraph=True)

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]], num_compiled: int) -> Logits:
        """Logits [num_compiled, V] of each sequence's last tokens, one a step, over keys of an eager step before."""
        num_pages = -(-max(map(len, sequences)) // PAGE_SIZE)
        # No sequence lies in one piece.
        pages = [range(at, num_pages * len(sequences), len(sequences)) for at in range(len(sequences))]
        starts = [len(tokens) - num_compiled for tokens in sequences]
        prompts = [Span(0, start, each) for start, each in zip(starts, pages, strict=True)]
        self._scores(*self._step(prompts, sequences))
        steps = []
        for done in range(num_compiled):
            spans = [Span(start + done, 1, each) for start, each in zip(starts, pages, strict=True)]
            steps.append(self._compiled(*self._step(spans, sequences)).float().cpu())
        return list(torch.stack(steps, 1))

    def _scores(self, context: ForwardContext, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self._model.logits(self._model.forward(context, Tokens(token_ids_T)))

    def _step(
        self, spans: Sequence[Span], sequences: Sequence[Sequence[int]]
    ) -> tuple[ForwardContext, torch.Tensor]:
        """A step over one span of each sequence, and its tokens."""
        rows = [
            (at, span.page_ids[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE, tokens[at])
            for span, tokens in zip(spans, sequences, strict=True)
            for at in range(span.start, span.num_kv_tokens)
        ]
        positions_T, slots_T, token_ids_T = torch.tensor(rows, device=self._device).T.contiguous()
        windows = self._build.windows
        plan = self._attention.plan(spans, page_size=PAGE_SIZE, windows=windows, device=self._device)
        return ForwardContext(positions_T, slots_T, self._attention, plan, self._pool), token_ids_T


@pytest.mark.parametrize("architecture", VARIANTS)
def test_compiled_steps_give_the_same(architecture: str, tmp_path: Path) -> None:
    case = Case(architecture, "plain", tmp_path, COMPILED_LENGTHS)
    compiled = CompiledModel(case, "cuda", "inductor")
    assert 0 < case.error(compiled.logits(case.sequences, NUM_COMPILED)) < 1
    assert len(compiled.graphs) == 1
