"""Teacher-forced logits of every architecture and variant, in float32, against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import ARCHITECTURES, quantise_in_place, tiny_model
from teacher_forcing import (
    TeacherForcedEngine,
    largest_difference,
    random_sequences,
    rewrite_config,
    root_mean_square,
    transformers_logits,
    with_weights_in,
)
from transformers import PreTrainedModel

from lockstep.core.errors import ModelFileError

pytestmark = pytest.mark.suite("cpu")

TOLERANCE = 1e-4
LENGTHS = (1, 9, 24, 47, 130)
# Shorter than a window and decoded across it; longer than a window; longer than yarn's original length.
NUM_PROMPT_TOKENS = (1, 5, 6, 30, 100)
CHUNK = 7
# The usual 0.02 would leave attention nearly uniform, and logits so small that no mistake is seen.
SPREAD: dict[str, Any] = {"initializer_range": 0.15}

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
# Odd: hidden is no power of two, heads are no multiple of four, nothing is a multiple of a vector register.
ODD = {
    "vocab_size": 101,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_hidden_layers": 3,
}
# Three quarters of the width per head; wider than the model altogether in the last case.
NARROW_HEADS, WIDE_HEADS = {"head_dim": 12}, {"head_dim": 24}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "mha": MHA,
        "mqa": MQA,
        "odd": ODD,
        "narrow_heads": NARROW_HEADS,
        "wide_heads": WIDE_HEADS,
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "eps": {"rms_norm_eps": 1e-3},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "linear": {"rope_parameters": LINEAR},
        "llama3": {"rope_parameters": LLAMA3},
        "yarn": {"rope_parameters": YARN},
        "yarn_scaled": {
            "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
        },
        "yarn_mscale": {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
        "yarn_untruncated": {"rope_parameters": YARN | {"truncate": False}},
    },
    "qwen2": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "mqa": MQA,
        "odd": {name: value for name, value in ODD.items() if name != "head_dim"},
        "windows": QWEN_WINDOWS,
        "windows_off": QWEN_WINDOWS | {"use_sliding_window": False},
        "yarn": {"rope_parameters": YARN},
    },
    "qwen3": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "mha": MHA,
        "odd": ODD,
        "wide_heads": WIDE_HEADS,
        "attention_bias": {"attention_bias": True},
        "windows": QWEN_WINDOWS,
        "yarn": {"rope_parameters": YARN},
    },
    "gemma3": {
        "plain": {},
        "untied": {"tie_word_embeddings": False},
        "mqa": MQA,
        "odd": ODD | {"num_hidden_layers": 7, "query_pre_attn_scalar": 10},
        "wide_heads": WIDE_HEADS,
        "query_scale": {"query_pre_attn_scalar": 40},
        "attention_bias": {"attention_bias": True},
        "pattern_of_two": {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
        "linear": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        "soft_capped_logits": {"final_logit_softcapping": 1.5},
    },
}


@dataclass
class Case:
    """One tiny model, saved, with transformers' logits of the test sequences."""

    model: PreTrainedModel
    path: Path
    sequences: list[list[int]] = field(init=False)
    expected: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.model.save_pretrained(self.path)
        self.sequences = random_sequences(self.model.config.vocab_size, LENGTHS)
        self.expected = transformers_logits(self.model, self.sequences)

    def found(self, *, chunk: int = CHUNK, **how: Any) -> list[torch.Tensor]:
        engine = TeacherForcedEngine(self.path, **how)
        return engine.logits(self.sequences, num_prompt_tokens=NUM_PROMPT_TOKENS, chunk=chunk)

    def difference(self, **how: Any) -> float:
        return largest_difference(self.found(**how), self.expected)


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [(name, variant) for name, variants in VARIANTS.items() for variant in variants],
)
def test_logits_are_those_of_transformers(architecture: str, variant: str, tmp_path: Path) -> None:
    case = Case(tiny_model(architecture, **SPREAD | VARIANTS[architecture][variant]), tmp_path)
    assert case.difference() < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_chunk_size_gives_them(architecture: str, chunk: int, tmp_path: Path) -> None:
    assert Case(tiny_model(architecture, **SPREAD), tmp_path).difference(chunk=chunk) < TOLERANCE


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN])
def test_older_spellings_of_rope_mean_the_same(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    rope = scaling or {"rope_type": "default", "rope_theta": 2e4}
    case = Case(tiny_model("llama", **SPREAD, rope_parameters=rope), tmp_path)
    parameters = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    for word in ("rope_type", "type"):
        older = {word: rope["rope_type"], **parameters} if scaling else None
        rewrite_config(tmp_path, rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=older)
        assert case.difference() < TOLERANCE


def test_older_spelling_of_gemmas_two_bases(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    case = Case(tiny_model("gemma3", **SPREAD, rope_parameters=ropes), tmp_path)
    rewrite_config(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        sliding_window_pattern=6,
        rope_theta=5e5,
        rope_local_base_freq=2e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert case.difference() < TOLERANCE


def test_soft_capped_scores(tmp_path: Path) -> None:
    case = Case(tiny_model("gemma3", **SPREAD, attn_logit_softcapping=2.0), tmp_path)
    # transformers reads the setting but hands it to no attention function: it has to be passed by hand.
    case.expected = transformers_logits(case.model, case.sequences, softcap=2.0)
    assert case.difference() < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "changed", "problem"),
    [
        ("llama", {"is_causal": False}, "see later ones"),
        ("qwen2", {"quantization_config": {"quant_method": "bitnet"}}, "quantised by bitnet"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs a number as its 'low_freq_factor'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "needs a number as its 'factor'"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "'chunked_attention'"),
    ],
)
def test_settings_that_would_change_the_maths_are_refused(
    architecture: str, changed: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    case = Case(tiny_model(architecture, **SPREAD), tmp_path)
    with pytest.raises(ModelFileError, match=problem):
        case.difference(changed=changed)


@pytest.mark.parametrize("unsaid", ["sliding_window", "query_pre_attn_scalar"])
def test_what_gemma_leaves_unsaid(unsaid: str, tmp_path: Path) -> None:
    value = {"sliding_window": 4096, "query_pre_attn_scalar": 256}[unsaid]
    case = Case(tiny_model("gemma3", **SPREAD, **{unsaid: value}), tmp_path)
    rewrite_config(tmp_path, **{unsaid: None})
    assert case.difference() < TOLERANCE


def test_layers_without_windows_that_qwen2_leaves_unsaid(tmp_path: Path) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28, "layer_types": None}
    case = Case(tiny_model("qwen2", **SPREAD | settings), tmp_path)
    rewrite_config(tmp_path, max_window_layers=None, layer_types=None)
    assert case.difference() < TOLERANCE


MUTANTS = [
    ("llama", {"rope_theta": 10_100.0}),
    ("llama", {"rms_norm_eps": 1e-3}),
    ("llama", {"rope_scaling": LINEAR | {"factor": 1.02}}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("qwen2", {"rope_theta": 10_100.0}),
    ("qwen3", {"rms_norm_eps": 1e-3}),
    ("gemma3", {"sliding_window": 7}),
    ("gemma3", {"sliding_window": 9}),
    ("gemma3", {"rope_theta": 1.02e6}),
    ("gemma3", {"rope_local_base_freq": 10_100.0}),
    ("gemma3", {"query_pre_attn_scalar": 16.1}),
    ("gemma3", {"attn_logit_softcapping": 50.0}),
    ("gemma3", {"final_logit_softcapping": 50.0}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 7}),
]


@pytest.mark.parametrize(("architecture", "wrong"), MUTANTS)
def test_the_tolerance_rejects_a_slightly_wrong_model(
    architecture: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(tiny_model(architecture, **SPREAD), tmp_path)
    assert case.difference(changed=wrong) > 3 * TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_rounds_no_more_than_transformers_does(architecture: str, tmp_path: Path) -> None:
    """Both run the same bfloat16 weights; the yardstick is how far transformers' own bfloat16 run is off."""
    model = tiny_model(architecture, **SPREAD)
    quantise_in_place(model, "BF16")
    with torch.no_grad():
        for parameter in model.parameters():  # the norms too, which GGUF keeps in float32
            parameter.copy_(parameter.bfloat16())
    case = Case(model, tmp_path)
    found = root_mean_square(case.found(dtype="bfloat16"), case.expected)
    rounded = with_weights_in(model, torch.bfloat16)
    yardstick = root_mean_square(transformers_logits(rounded, case.sequences), case.expected)
    print(f"rms error {found:.5f}, of transformers {yardstick:.5f}")
    assert 0 < found < 1.5 * yardstick
