"""Weights by canonical name, against transformers and against slices of the whole."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import ARCHITECTURES, quantise_in_place, tiny_model, write_gguf
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lockstep.core.errors import ModelFileError
from lockstep.formats import embedded_model_path, open_model
from lockstep.models.loading.weights import FileWeights

pytestmark = pytest.mark.suite("cpu")

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def transformers_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What transformers itself reads from a GGUF file, by its own names."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)[
        "tensors"
    ]
    return {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}


def assert_same(weights: FileWeights, expected: dict[str, torch.Tensor]) -> None:
    assert set(weights.names()) == set(expected)
    for name, tensor in expected.items():
        found = weights.load(name, torch.float32)
        assert found.shape == tensor.shape and torch.equal(found, tensor), name


def test_the_embedded_model_is_what_transformers_reads() -> None:
    path = embedded_model_path()
    assert_same(FileWeights(open_model(path)), transformers_tensors(path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_written_model_is_what_transformers_reads(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tiny_model(architecture), tmp_path / "tiny.gguf", "Q8_0")
    assert_same(FileWeights(open_model(path)), transformers_tensors(path))


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_gives_back_the_model_it_was_made_of(
    architecture: str, quantisation: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    path = write_gguf(model, tmp_path / "tiny.gguf", quantisation)
    quantise_in_place(model, quantisation)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = FileWeights(open_model(path))
    assert set(weights.names()) == set(expected)
    for name, tensor in expected.items():
        # Adding one and taking it away again, as Gemma's norms are stored, costs a rounding.
        tolerance = 2e-7 if architecture == "gemma3" and "norm" in name else 0.0
        torch.testing.assert_close(weights.load(name, torch.float32), tensor, rtol=0, atol=tolerance)


def test_llama_rows_and_biases_leave_their_stored_order(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True)
    weights = FileWeights(open_model(write_gguf(model, tmp_path / "tiny.gguf")))
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"):
        full_name = f"model.layers.1.self_attn.{name}"
        expected = model.state_dict()[full_name]
        stored = np.fromfile(weights.info(full_name).file, np.uint8)
        info = weights.info(full_name)
        as_stored = torch.from_numpy(stored[info.offset :][: info.nbytes].view(np.float32)).view(expected.shape)
        assert not torch.equal(as_stored, expected), (
            "the file must hold another order for this test to mean anything"
        )
        assert torch.equal(weights.load(full_name, torch.float32), expected)


@pytest.mark.parametrize("quantisation", ["F32", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_slice_is_the_slice_of_the_whole(architecture: str, quantisation: str, tmp_path: Path) -> None:
    weights = FileWeights(
        open_model(write_gguf(tiny_model(architecture), tmp_path / "tiny.gguf", quantisation))
    )
    for name in weights.names():
        if ".layers." in name and ".layers.1." not in name:
            continue
        whole = weights.load(name, torch.float32)
        for dim, size in enumerate(whole.shape):
            for start, length in (
                (0, size),
                (0, size // 2),
                (size // 4, size // 2),
                (size // 3, 5),
                (size - 1, None),
            ):
                part = weights.load(name, torch.float32, dim=dim, start=start, length=length)
                stop = size if length is None else start + length
                assert torch.equal(part, whole.narrow(dim, start, stop - start)), (name, dim, start, length)
                assert part.is_contiguous()


def test_packed_rows_mean_the_loaded_values(tmp_path: Path) -> None:
    weights = FileWeights(open_model(write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "Q4_1")))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        data, storage = weights.raw(name)
        whole = weights.load(name, torch.float32)
        assert storage.name == "Q4_1" and data.dtype == torch.uint8
        assert data.shape == (whole.shape[0], storage.row_bytes(whole.shape[1]))
        assert torch.equal(storage.dequantise(data, torch.float32), whole)
        part = weights.raw(name, dim=1, start=32, length=32)
        assert torch.equal(part.storage.dequantise(part.data, torch.float32), whole[:, 32:64])
        part = weights.raw(name, dim=0, start=7, length=21)
        assert torch.equal(part.storage.dequantise(part.data, torch.float32), whole[7:28])
    with pytest.raises(ModelFileError, match="whole Q4_1 blocks of 32"):
        weights.raw("model.layers.0.mlp.down_proj.weight", dim=1, start=16, length=32)


def test_shifted_norms_have_no_packed_form(tmp_path: Path) -> None:
    weights = FileWeights(open_model(write_gguf(tiny_model("gemma3"), tmp_path / "tiny.gguf")))
    with pytest.raises(ModelFileError, match="stored with 1 added"):
        weights.raw("model.norm.weight")


def test_k_quants_are_read_from_a_file(tmp_path: Path) -> None:
    seed = 11
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q5_K", "Q6_K")]
    expected = {}
    path = tmp_path / "k.gguf"

    def add(writer: gguf.GGUFWriter) -> None:
        for kind in kinds:
            raw = generator.integers(0, 60, (8, gguf.GGML_QUANT_SIZES[kind][1] * 2), dtype=np.uint8)
            writer.add_tensor(f"extra_{kind.name}", raw, raw_dtype=kind)
            expected[f"extra_{kind.name}"] = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind)))

    weights = FileWeights(open_model(write_gguf(tiny_model("qwen2"), path, add=add)))
    for name, values in expected.items():
        assert torch.equal(weights.load(name, torch.float32), values)
        assert torch.equal(weights.load(name, torch.float32, dim=1, start=200, length=100), values[:, 200:300])


def test_safetensors_of_every_float_type_and_odd_offsets(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=generator).half(),
        "b.weight": torch.randn(7, 3, generator=generator).bfloat16(),
        "c.weight": torch.randn(4, 6, generator=generator),
        "c.bias": torch.randn(9, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "experts": torch.randn(3, 4, 5, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weights = FileWeights(open_model(tmp_path))
    assert set(weights.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(weights.load(name, torch.float32), tensor.float())
        assert torch.equal(weights.load(name, tensor.dtype), tensor)
    assert torch.equal(
        weights.load("experts", torch.float32, dim=0, start=1, length=1), tensors["experts"][1:2]
    )
    assert torch.equal(
        weights.load("b.weight", torch.float32, dim=1, start=1), tensors["b.weight"][:, 1:].float()
    )


def test_unaligned_data_is_given_an_aligned_address(tmp_path: Path) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(6))
    header = b'{"a":{"dtype":"F32","shape":[3,5],"data_offsets":[0,60]}}'
    header += b" " * ((3 - len(header)) % 8)
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + values.numpy().tobytes()
    )
    (tmp_path / "config.json").write_text("{}")
    weights = FileWeights(open_model(tmp_path))
    assert weights.info("a").offset % 4 == 3
    loaded = weights.load("a", torch.float32)
    assert loaded.data_ptr() % 4 == 0 and torch.equal(loaded, values)


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    FileWeights(open_model(tmp_path)).load("a", torch.float32).zero_()
    assert torch.equal(FileWeights(open_model(tmp_path)).load("a", torch.float32), torch.ones(64))


def test_refusals_name_the_tensor(tmp_path: Path) -> None:
    save_file(
        {"model.norm.weight": torch.ones(8), "ids": torch.arange(4), "cube": torch.ones(2, 2, 2)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    weights = FileWeights(open_model(tmp_path))
    with pytest.raises(
        ModelFileError, match=r"'model.norm.wieght' is missing; did you mean 'model.norm.weight'"
    ):
        weights.load("model.norm.wieght", torch.float32)
    with pytest.raises(ModelFileError, match=r"tensor 'ids': storage type 'I64' is not supported"):
        weights.load("ids", torch.float32)
    with pytest.raises(ModelFileError, match=r"no entries 4 to 12 of dim 0"):
        weights.load("model.norm.weight", torch.float32, dim=0, start=4, length=8)
    with pytest.raises(ModelFileError, match=r"cannot be sliced along dim 1"):
        weights.load("cube", torch.float32, dim=1, start=0, length=1)
    with pytest.raises(ModelFileError, match=r"a slice needs its dim"):
        weights.load("model.norm.weight", torch.float32, start=1)


def test_what_is_forgotten_is_read_again(tmp_path: Path) -> None:
    """Giving the memory of a tensor back changes no value, not even of views that are still held."""
    from lockstep.formats import embedded_model_path

    source = FileWeights(open_model(embedded_model_path()))
    name = "model.layers.0.mlp.down_proj.weight"
    held, _ = source.raw(name)
    before = held.clone()
    source.forget(name)
    assert torch.equal(held, before)
    assert torch.equal(source.raw(name).data, before)
