"""Qwen 3 MoE: teacher-forced logits against transformers, every way of storing experts, every split."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_forcing import (
    TeacherForcedEngine,
    largest_difference,
    random_sequences,
    rewrite_config,
    transformers_logits,
)
from tiny_models import CONTEXT_LENGTH, SeededWeights, TinyModel, build_over
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lockstep.attention.backend import Span
from lockstep.core.errors import ConfigError, LockstepError, ModelFileError
from lockstep.formats import open_model
from lockstep.layers.build import ForwardContext
from lockstep.layers.moe import MoE
from lockstep.layers.norm import NormSpec
from lockstep.models.loading.sources import ShapeWeights, StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.processes import connect

pytestmark = pytest.mark.suite("cpu")

TOLERANCE = 1e-4
LENGTHS = (1, 9, 24, 47)
NUM_PROMPT_TOKENS = (1, 5, 6, 30)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renormalised": {"norm_topk_prob": True},
    "every other layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "some layers dense": {"mlp_only_layers": [0, 2], "num_hidden_layers": 3},
    "one expert per token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "odd": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 33, "hidden_size": 60},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


def tiny_model(path: Path, **overrides: Any) -> Qwen3MoeForCausalLM:
    """A random float32 model of transformers, saved: 2 layers, width 64, 8 experts of which 2 are chosen."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        # The usual 0.02 would leave routing and attention nearly uniform, and no mistake would be seen.
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("mlp.gate.weight"):  # transformers leaves it at zero: every token would tie
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    # Its other ways need widths that are multiples of 16 bytes.
    model.set_experts_implementation("eager")
    return model


def difference(model: Qwen3MoeForCausalLM, path: Path, **how: Any) -> float:
    sequences = random_sequences(model.config.vocab_size, LENGTHS)
    expected = transformers_logits(model, sequences)
    engine = TeacherForcedEngine(path, **how)
    return largest_difference(engine.logits(sequences, num_prompt_tokens=NUM_PROMPT_TOKENS, chunk=7), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    assert difference(tiny_model(tmp_path, **VARIANTS[variant]), tmp_path) < TOLERANCE


WRONG = [
    {"norm_topk_prob": True},
    {"num_experts_per_tok": 3},
    {"rms_norm_eps": 1e-3},
    {"rope_theta": 10_100.0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_tolerance_rejects_a_slightly_wrong_model(wrong: dict[str, Any], tmp_path: Path) -> None:
    assert difference(tiny_model(tmp_path), tmp_path, changed=wrong) > 3 * TOLERANCE


def test_both_names_of_the_number_of_experts(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    rewrite_config(tmp_path, num_local_experts=None, num_experts=8)
    assert difference(model, tmp_path) < TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
def test_experts_stored_together(packed: bool, tmp_path: Path) -> None:
    """All experts of a layer in one tensor: gate and up apart, as GGUF has them, or packed, as transformers holds
    them in memory."""
    model = tiny_model(tmp_path)
    expected = terms_of_ranks(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    names = {name: name.split(".") for name in stored if ".experts." in name}
    for parts in {tuple(parts[:5]) for parts in names.values()}:
        prefix = ".".join(parts)
        gate, up, down = (
            torch.stack([stored.pop(f"{prefix}.{index}.{kind}_proj.weight") for index in range(8)])
            for kind in ("gate", "up", "down")
        )
        if packed:
            stored |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), 1), f"{prefix}.down_proj": down}
        else:
            stored |= {
                f"{prefix}.{kind}_proj.weight": t for kind, t in zip(KINDS, (gate, up, down), strict=True)
            }
    save_file(stored, file)
    assert difference(model, tmp_path) < TOLERANCE
    for (found, num_bytes), (wanted, wanted_bytes) in zip(terms_of_ranks(tmp_path), expected, strict=True):
        assert torch.equal(found, wanted) and num_bytes == wanted_bytes


@torch.inference_mode()
def terms_of_ranks(path: Path) -> list[tuple[torch.Tensor, int]]:
    """What each of four ranks makes of the first routed block, and the bytes that it read for it."""
    found = []
    for rank in range(4):
        weights = StoredWeights(FileWeights(open_model(path)))
        build = build_over(Mesh.shapes_only({"ep": 2, "tp": 2}, rank=rank), weights)
        layer = MoE(
            build,
            "model.layers.0.mlp",
            norm=NormSpec("model.layers.0.post_attention_layernorm", 64, 1e-6),
            inner_size=32,
            num_experts=8,
            top_k=2,
            renormalise=True,
        )
        streams = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
        term, _ = layer(cast(ForwardContext, None), *streams)
        found.append((term.take(), build.weight_bytes))
    return found


KINDS = ("gate", "up", "down")

LAYOUT: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 21,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT_LENGTH,
}
SPANS = (Span(0, 5, (0, 1)), Span(6, 1, (2, 3)), Span(4, 3, (4, 5)))


SPLITS = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (6, 1), (2, 2), (4, 2), (3, 4)]


@pytest.mark.parametrize(("ep", "tp"), SPLITS)
def test_shapes_of_every_split(ep: int, tp: int) -> None:
    """Built for every rank with no devices; the ranks' parts add up to the whole model."""
    counts = []
    for rank in range(ep * tp):
        build = build_over(Mesh.shapes_only({"ep": ep, "tp": tp}, rank=rank), ShapeWeights(), meta=True)
        hidden_TD, logits_TV = TinyModel(build, LAYOUT).step(SPANS)
        assert hidden_TD.shape == (9, 36) and logits_TV.shape == (9, 101)
        counts.append(build.weight_bytes)
    whole = build_over(Mesh.solo(), ShapeWeights(), meta=True)
    TinyModel(whole, LAYOUT)
    held_by_all = 36 * (2 * 3 + 1) + 2 * 8 * 3 + 2 * 6 * 36  # norms of D and of heads, routers
    kv_copies = max(1, tp // 4) - 1
    kv_twice = 3 * 2 * 4 * 8 * 36
    experts = 2 * 6 * 3 * 21 * 36
    held_by_tp = whole.weight_bytes // 4 - experts + (tp - 1) * held_by_all + kv_copies * kv_twice
    assert sum(counts) == 4 * (experts + ep * held_by_tp)


def test_more_ranks_than_inner_units() -> None:
    narrow = LAYOUT | {"moe_intermediate_size": 3}
    with pytest.raises(ConfigError, match="3 cannot be shared out over --tp 4"):
        for rank in range(4):
            build = build_over(Mesh.shapes_only({"tp": 4}, rank=rank), ShapeWeights(), meta=True)
            TinyModel(build, narrow)


@pytest.mark.parametrize(("ep", "tp"), [(1, 2), (1, 4), (2, 1), (3, 1), (2, 2)])
def test_split_models_agree_with_one_rank(ep: int, tp: int, tmp_path: Path) -> None:
    expected = TinyModel(build_over(Mesh.solo(), SeededWeights()), LAYOUT).logits()
    sizes = {"ep": ep, "tp": tp}
    ranks = on_ranks(
        sizes, tmp_path / "store", lambda mesh: TinyModel(build_over(mesh, SeededWeights()), LAYOUT)
    )
    assert expected.std() > 0.3
    for logits in ranks:
        assert torch.equal(logits, ranks[0]), "ranks disagree in the last bit"
        assert float((logits - expected).abs().max()) < 1e-5


def on_ranks(sizes: dict[str, int], store: Path, build: Callable[[Mesh], TinyModel]) -> list[torch.Tensor]:
    """Logits of a model on each rank: threads of this process, joined by real Gloo groups."""
    found: dict[int, torch.Tensor] = {}

    def rank_main(rank: int) -> None:
        with torch.inference_mode():
            device = torch.device("cpu")
            mesh = connect(sizes, rank=rank, store=store, backend="gloo", device=device)
            found[rank] = build(mesh).logits()

    ranks = range(math.prod(sizes.values()))
    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_experts": None}, "needs a positive 'num_experts', not None"),
        ({"moe_intermediate_size": 0}, "needs a positive 'moe_intermediate_size', not 0"),
        ({"num_experts_per_tok": 7}, "each token wants 7 experts, but the model has 6"),
        ({"hidden_act": "gelu"}, "experts with activation 'gelu' are not supported, only silu"),
    ],
)
def test_settings_that_cannot_work(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        TinyModel(build_over(Mesh.solo(), ShapeWeights(), meta=True), LAYOUT | changed)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.mlp.experts.5.down_proj.weight"]
    save_file(stored, file)
    with pytest.raises(
        LockstepError, match=r"model\.layers\.1\.mlp\.experts\.5\.down_proj\.weight' is missing"
    ):
        TeacherForcedEngine(tmp_path)
