"""What a GGUF file says about its model, against transformers' own reading and the configs it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFWriter
from gguf_files import ARCHITECTURES, tiny_model, write_gguf
from transformers import AutoConfig

from lockstep.core.errors import ModelFileError
from lockstep.formats import embedded_model_path, open_model
from lockstep.formats.gguf_model import canonical_name
from lockstep.formats.rope import classic_rope, llama3_factors, llama3_scaling

pytestmark = pytest.mark.suite("cpu")

SHARED_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)


def assert_config(found: Any, expected: dict[str, Any], *extra: str) -> None:
    for name in (*SHARED_FIELDS, *extra):
        assert found[name] == expected[name], name
    assert found["rms_norm_eps"] == pytest.approx(expected["rms_norm_eps"], rel=1e-7)


def test_the_embedded_config_is_what_transformers_makes_of_it() -> None:
    path = embedded_model_path()
    files = open_model(path)
    expected = classic_rope(AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict())
    assert_config(
        files.config, expected, "head_dim", "hidden_act", "attention_bias", "rope_theta", "rope_scaling"
    )
    assert files.config["architectures"] == ["LlamaForCausalLM"]
    assert files.eos_token_ids == (expected["eos_token_id"],)
    assert files.bos_token_id == expected["bos_token_id"]
    assert (files.kind, files.name) == ("gguf", "SmolLM2-135M-Instruct.Q4_1")
    assert files.num_parameters == 134_515_008, "published size of SmolLM2-135M"
    assert files.main_storage_type == "Q4_1"
    assert files.pooling is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_written_config_comes_back(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    files = open_model(write_gguf(model, tmp_path / "tiny.gguf"))
    expected = classic_rope(model.config.to_dict())
    extra = ["rope_theta", "rope_scaling"]
    if architecture != "qwen2":
        extra.append("head_dim")
    if architecture == "gemma3":
        extra += [
            "sliding_window",
            "layer_types",
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "hidden_activation",
        ]
    assert_config(files.config, expected, *extra)
    assert files.config["architectures"] == [type(model).__name__]
    assert files.config["attention_bias"] is (architecture == "qwen2")
    if architecture == "gemma3":
        assert set(expected["layer_types"]) == {"sliding_attention", "full_attention"}


def test_untied_embeddings_are_seen_by_their_tensor(tmp_path: Path) -> None:
    for tied in (True, False):
        files = open_model(write_gguf(tiny_model("qwen3", tie_word_embeddings=tied), tmp_path / f"{tied}.gguf"))
        assert files.config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in files.tensors) is not tied


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rope_scaling_comes_back(architecture: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(architecture, rope_parameters=scaling | {"rope_theta": 5e5})
    config = open_model(write_gguf(model, tmp_path / "tiny.gguf")).config
    assert config["rope_scaling"] == scaling
    assert config["rope_theta"] == 5e5


def test_gemma_scales_only_its_global_layers(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = open_model(write_gguf(tiny_model("gemma3", rope_parameters=rope), tmp_path / "tiny.gguf")).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("factor", "high", "original"), [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (6.0, 9.0, 2048)]
)
def test_llama3_scaling_is_recovered_from_the_stored_factors(
    factor: float, high: float, original: int, tmp_path: Path
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    model = tiny_model(
        "llama", head_dim=64, max_position_embeddings=65536, rope_parameters=scaling | {"rope_theta": 5e5}
    )
    files = open_model(write_gguf(model, tmp_path / "tiny.gguf"))
    assert not any("rope" in name for name in files.tensors), "the factors are settings, not a weight to load"
    found = dict(files.config["rope_scaling"])
    assert found.pop("factor") == pytest.approx(scaling.pop("factor"), rel=1e-6)
    assert found == scaling
    inv_freq = model.model.rotary_emb.inv_freq.double()
    unscaled = [5e5 ** (-index / 32) for index in range(32)]
    factors = llama3_factors(unscaled, factor=factor, **{k: found[k] for k in found if k != "rope_type"})
    assert [a / b for a, b in zip(unscaled, factors, strict=True)] == pytest.approx(inv_freq.tolist(), rel=1e-5)


def test_factors_of_another_rule_are_refused() -> None:
    assert llama3_scaling([1.0] * 16, 1e4) is None
    with pytest.raises(ValueError, match="llama3 rule"):
        llama3_scaling([1.0 + index for index in range(16)], 1e4)


def test_names_agree_with_the_gguf_package() -> None:
    for architecture, arch in zip(
        ARCHITECTURES,
        (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3, gguf.MODEL_ARCH.GEMMA3),
        strict=True,
    ):
        model = tiny_model(architecture)
        table = gguf.get_tensor_name_map(arch, 7)
        for name in model.state_dict():
            stem, kind = name.rsplit(".", 1)
            assert canonical_name(f"{table.get_name(stem)}.{kind}", architecture) == name
    assert canonical_name("blk.3.mystery.weight", "llama") == "blk.3.mystery.weight"
    assert canonical_name("rope_freqs.weight", "llama") == "rope_freqs.weight"


def test_every_token_that_ends_a_turn_is_an_end(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        tokens = [f"t{index}" for index in range(96)]
        tokens[7], tokens[9], tokens[11] = "<end_of_turn>", "<|im_end|>", "<|eot_id|>"
        writer.add_token_list(tokens)
        writer.add_token_types([3 if index in (7, 9) else 1 for index in range(96)])
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(7)
        writer.add_bos_token_id(2)
        writer.add_sampling_temp(0.5)
        writer.add_sampling_top_k(20)

    files = open_model(write_gguf(tiny_model("gemma3"), tmp_path / "tiny.gguf", add=add))
    assert files.eos_token_ids == (1, 7, 9), "11 is an ordinary token that only looks like an end"
    assert files.bos_token_id == 2
    assert files.generation_config == {
        "temperature": 0.5,
        "top_k": 20,
        "eos_token_id": [1, 7, 9],
        "bos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("kind", "expected"), [("MEAN", "mean"), ("LAST", "last"), ("CLS", None), ("NONE", None)]
)
def test_pooling_is_what_the_file_declares(kind: str, expected: str | None, tmp_path: Path) -> None:
    path = write_gguf(
        tiny_model("qwen3"),
        tmp_path / "tiny.gguf",
        add=lambda writer: writer.add_pooling_type(gguf.PoolingType[kind]),
    )
    assert open_model(path).pooling == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        # Older files name no type, and the oldest have a name of their own for the factor.
        ("rope.scaling.factor", 4.0, {"rope_type": "linear", "factor": 4.0}),
        ("rope.scale_linear", 2.0, {"rope_type": "linear", "factor": 2.0}),
        ("rope.scale_linear", 1.0, None),
        ("rope.scaling.factor", 0.0, None),
    ],
)
def test_scaling_of_positions_without_a_type(
    key: str, value: float, expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = write_gguf(
        tiny_model("llama"),
        tmp_path / "tiny.gguf",
        add=lambda writer: writer.add_float32(f"llama.{key}", value),
    )
    assert open_model(path).config["rope_scaling"] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.scale", 0.5), ("logit_scale", 4.0), ("rope.scaling.yarn_log_multiplier", 0.1)],
)
def test_settings_that_change_the_maths_are_refused(key: str, value: float, tmp_path: Path) -> None:
    path = write_gguf(
        tiny_model("llama"),
        tmp_path / "tiny.gguf",
        add=lambda writer: writer.add_float32(f"llama.{key}", value),
    )
    with pytest.raises(ModelFileError, match=f"{key} {value:g} is not supported"):
        open_model(path)


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tiny_model("llama"), tmp_path / "tiny.gguf", add=lambda writer: writer.add_causal_attention(False)
    )
    with pytest.raises(ModelFileError, match="see later ones"):
        open_model(path)


@pytest.mark.parametrize(
    ("find", "replace", "problem"),
    [
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lambda"[:13], "architecture 'lambd' is not supported"),
        (b"llama.embedding_length", b"llama.embedding_width_", "'llama.embedding_length' is missing"),
        (
            b"llama.block_count\4\0\0\0\2\0\0\0",
            b"llama.block_count\4\0\0\0\0\0\0\x7f",
            "2130706432 layers are declared",
        ),
        (
            b"llama.attention.key_length\4\0\0\0\x10",
            b"llama.attention.key_length\4\0\0\0\x0f",
            "heads of 15 of which 16 are rotated",
        ),
    ],
)
def test_metadata_that_makes_no_model_is_refused(
    find: bytes, replace: bytes, problem: str, tmp_path: Path
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    content = path.read_bytes()
    assert find in content and len(find) == len(replace)
    path.write_bytes(content.replace(find, replace, 1))
    with pytest.raises(ModelFileError, match=problem) as caught:
        open_model(path)
    assert "tiny.gguf" in str(caught.value)
