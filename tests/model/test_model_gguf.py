"""Models from GGUF files of every storage type, against transformers with the weights that the gguf package reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import ARCHITECTURES, quantise_in_place, tiny_model, write_gguf
from k_quants import PACKERS, teach_gguf
from teacher_forcing import TeacherForcedEngine, largest_difference, random_sequences, transformers_logits
from transformers import PreTrainedModel

pytestmark = pytest.mark.suite("cpu")

TOLERANCE = 1e-4
SPREAD: dict[str, Any] = {"initializer_range": 0.15}
STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def difference(model: PreTrainedModel, path: Path) -> float:
    """Our logits from the file against the model's own."""
    sequences = random_sequences(model.config.vocab_size, (9, 47, 90))
    engine = TeacherForcedEngine(path)
    found = engine.logits(sequences, num_prompt_tokens=(4, 30, 80), chunk=7)
    return largest_difference(found, transformers_logits(model, sequences))


def through_a_file(model: PreTrainedModel, quantisation: str, directory: Path) -> float:
    path = write_gguf(model, directory / "tiny.gguf", quantisation)
    unrounded = model.state_dict()["model.layers.1.mlp.down_proj.weight"].clone()
    quantise_in_place(model, quantisation)
    rounded = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert (quantisation == "F32") == bool((unrounded == rounded).all()), "the storage type must matter"
    return difference(model, path)


@pytest.mark.parametrize("quantisation", STORED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_gives_the_logits_of_transformers(
    architecture: str, quantisation: str, tmp_path: Path
) -> None:
    assert through_a_file(tiny_model(architecture, **SPREAD), quantisation, tmp_path) < TOLERANCE


@pytest.mark.parametrize("quantisation", PACKERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_k_quants_give_the_logits_of_transformers(
    architecture: str, quantisation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach_gguf(monkeypatch)
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    layers = {"num_hidden_layers": 6 if architecture == "gemma3" else 2}
    model = tiny_model(architecture, initializer_range=0.08, **wide, **layers)
    assert through_a_file(model, quantisation, tmp_path) < TOLERANCE


@pytest.mark.parametrize(("name", "largest_error"), [("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.02)])
def test_packed_k_blocks_hold_what_was_packed(
    name: str, largest_error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is the range of a group (about 4.1 for 32 normal values) over 15 or 31, or twice its largest (about
    1.8 of 16) over 63; rounding to the nearest is off by step / sqrt(12) in the mean."""
    teach_gguf(monkeypatch)
    seed = 5
    print(f"seed {seed}")
    values = np.random.default_rng(seed).normal(size=(16, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    read_back = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    rms = float(np.sqrt(np.square(read_back - values).mean()))
    print(f"rms error {rms:.4f}")
    assert 0 < rms < largest_error


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_survives_a_gguf_file(rope: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **SPREAD, rope_parameters=ROPES[rope])
    path = write_gguf(model, tmp_path / "tiny.gguf")
    assert difference(model, path) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "variant"), [("llama", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 24})]
)
def test_variants_survive_a_gguf_file(architecture: str, variant: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(architecture, **SPREAD | variant)
    assert through_a_file(model, "Q8_0", tmp_path) < TOLERANCE
