"""Hugging Face directories: written by transformers and safetensors, read here."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import ARCHITECTURES, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.core.errors import ModelFileError
from lockstep.formats import open_model
from lockstep.formats.safetensors_header import read_safetensors_header
from lockstep.models.loading.weights import FileWeights

pytestmark = pytest.mark.suite("cpu")


def directory(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file(tensors or {"a": torch.ones(4)}, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_comes_back_whole_or_in_shards(
    architecture: str, shard_size: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = open_model(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard_size == "60KB")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = FileWeights(files)
    assert set(weights.names()) == set(expected)
    assert all(torch.equal(weights.load(name, torch.float32), expected[name]) for name in expected)
    assert files.kind == "huggingface" and files.name == tmp_path.name
    assert files.config["architectures"] == [type(model).__name__]
    assert files.config["tie_word_embeddings"] is model.config.tie_word_embeddings
    assert files.num_parameters == sum(tensor.numel() for tensor in expected.values())
    assert files.main_storage_type == "F32"


def test_both_spellings_of_rotary_settings_read_the_same(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    nested = open_model(directory(tmp_path, {"rope_parameters": {"rope_theta": 1e6, **scaling}})).config
    flat = open_model(
        directory(tmp_path, {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    ).config
    for config in (nested, flat):
        assert config["rope_theta"] == 1e6
        assert config["rope_scaling"] == scaling
    default = {"rope_theta": 1e6, "rope_type": "default"}
    assert open_model(directory(tmp_path, {"rope_parameters": default})).config["rope_scaling"] is None
    local = {"full_attention": default, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    config = open_model(directory(tmp_path, {"rope_parameters": local})).config
    assert (config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]) == (1e6, 1e4, None)


def test_which_spelling_of_rotary_settings_wins(tmp_path: Path) -> None:
    """The one that transformers follows: scaling at the top if it says something, else all that is nested."""
    nested = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    linear = {"rope_type": "linear", "factor": 2.0}
    for top, expected in ((None, linear), ({"rope_type": "linear", "factor": 4.0}, linear | {"factor": 4.0})):
        config = {"rope_parameters": nested, "rope_theta": 1e4, "rope_scaling": top}
        found = open_model(directory(tmp_path, config)).config
        assert (found["rope_theta"], found["rope_scaling"]) == (1e6, expected)
    layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4, **linear}}
    with pytest.raises(ModelFileError, match="scaled positions in sliding layers"):
        open_model(directory(tmp_path, {"rope_parameters": layers}))


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers: a model that was saved again leaves the shards of the one before."""
    path = directory(tmp_path, **{"new.weight": torch.ones(2)})
    save_file({"old.weight": torch.ones(2)}, path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"old.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_model(path).tensors) == {"new.weight"}


def test_checkpoints_of_the_bare_model_get_the_full_names(tmp_path: Path) -> None:
    names = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "score.weight")
    files = open_model(directory(tmp_path, **{name: torch.ones(2, 2) for name in names}))
    assert set(files.tensors) == {"model." + names[0], "model." + names[1], "model." + names[2], names[3]}
    assert files.tensors["model.norm.weight"].stored_name == "norm.weight"


def test_generation_config_wins_over_config(tmp_path: Path) -> None:
    path = directory(tmp_path, {"eos_token_id": 1, "bos_token_id": 5})
    assert open_model(path).eos_token_ids == (1,)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "bos_token_id": null, "top_k": 20}')
    files = open_model(path)
    assert (files.eos_token_ids, files.bos_token_id) == ((7, 8), 5)
    assert files.generation_config["top_k"] == 20
    (path / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(ModelFileError, match="eos_token_id must be a token id"):
        open_model(path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True}, None),
    ],
)
def test_pooling_is_what_sentence_transformers_declares(
    settings: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    path = directory(tmp_path)
    assert open_model(path).pooling is None
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert open_model(path).pooling == expected
    modules.append({"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"})
    (path / "modules.json").write_text(json.dumps(modules))
    assert open_model(path).pooling == expected
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFileError, match="embeddings that go through Dense are not supported"):
        open_model(path)


def test_headers_agree_with_the_safetensors_package(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.int64)
    save_file({str(dtype): torch.zeros(3, 8).to(dtype) for dtype in dtypes}, tmp_path / "a.safetensors")
    found = {tensor.name: tensor for tensor in read_safetensors_header(tmp_path / "a.safetensors")}
    with safe_open(tmp_path / "a.safetensors", "pt") as expected:
        assert set(found) == set(expected.keys())
        for name in expected.keys():  # noqa: SIM118
            part = expected.get_slice(name)
            assert (found[name].storage_type, list(found[name].shape)) == (part.get_dtype(), part.get_shape())


def safetensors_bytes(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


BROKEN = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "length": (struct.pack("<Q", 2**50) + bytes(64), "a header of 1125899906842624 bytes"),
    "json": (safetensors_bytes(b'{"a": '), "the header is broken"),
    "deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "the header is broken"),
    "list": (safetensors_bytes([1]), "not a table of tensors"),
    "twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "a name appears twice"),
    "entry": (safetensors_bytes({"a": 5}), "'a' has a broken entry"),
    "dtype": (safetensors_bytes({"a": entry(dtype="F31")}), "'a' has a broken entry"),
    "offsets": (safetensors_bytes({"a": entry(data_offsets=[0])}), "'a' has a broken entry"),
    "negative": (safetensors_bytes({"a": entry(shape=[-2, -2])}), "'a' of type F32"),
    "fraction": (safetensors_bytes({"a": entry(shape=[4.0])}), "'a' of type F32"),
    "size": (
        safetensors_bytes({"a": entry(shape=[5])}),
        "'a' of type F32 and shape .5. cannot lie in bytes 0 to 16",
    ),
    "huge": (safetensors_bytes({"a": entry(shape=[2**40], data_offsets=[0, 2**42])}), "truncated"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry()}), "'b' overlaps 'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    content, problem = BROKEN[case]
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=problem) as caught:
        read_safetensors_header(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_cut_and_flipped_safetensors_are_refused_or_read(tmp_path: Path) -> None:
    seed = 3
    print(f"seed {seed}")
    generator = random.Random(seed)
    path = directory(tmp_path, **{f"model.layers.{index}.weight": torch.ones(3, 3) for index in range(6)})
    file = path / "model.safetensors"
    original = file.read_bytes()
    for length in range(len(original)):
        file.write_bytes(original[:length])
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            open_model(path)
    refused = 0
    for _ in range(2000):
        content = bytearray(original)
        content[generator.randrange(600)] = generator.randrange(256)
        file.write_bytes(bytes(content))
        try:
            open_model(path)
        except ModelFileError:
            refused += 1
    assert 0 < refused < 2000


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelFileError, match=rf"{shard.name} is missing \(1 of \d shards\)"):
        open_model(tmp_path)
    shard.write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    weight_map["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(weight_map))
    with pytest.raises(ModelFileError, match="files of this directory"):
        open_model(tmp_path)


def test_pickles_are_refused_in_one_line_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for spec in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ModelFileError, match="pickle, which can run any code") as caught:
            open_model(spec)
        assert "convert the model to safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[1]", "config.json: must hold a JSON object"),
        ("config.json", "[" * 100_000, "config.json: not valid JSON"),
        ("generation_config.json", "\ufffe", "generation_config.json: not valid JSON"),
        ("modules.json", '{"a": 1}', "modules.json: not a list of modules"),
        ("modules.json", '[{"type": "x.Pooling", "path": "1_Pooling"}]', "config.json is missing"),
    ],
)
def test_broken_json_is_refused_by_name(name: str, content: str, problem: str, tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / name).write_text(content)
    with pytest.raises(ModelFileError, match=problem):
        open_model(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelFileError, match="'a' is stored twice"):
        open_model(tmp_path)


def test_a_directory_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"neither config.json nor a .gguf file"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="no weights"):
        open_model(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="no tensor is stored here"):
        open_model(tmp_path)
