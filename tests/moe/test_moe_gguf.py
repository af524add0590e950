"""A GGUF file of Qwen 3 MoE, written with the gguf package: logits of transformers, F32 and quantised experts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import stored_type
from teacher_forcing import TeacherForcedEngine, largest_difference, random_sequences, transformers_logits
from test_moe_model import NUM_PROMPT_TOKENS, tiny_model
from transformers import Qwen3MoeForCausalLM

from lockstep.core.errors import ModelFileError
from lockstep.formats.gguf_model import open_gguf
from lockstep.models.loading.weights import FileWeights

pytestmark = pytest.mark.suite("cpu")


def stored_tensors(model: Qwen3MoeForCausalLM) -> dict[str, torch.Tensor]:
    """Tensors under llama.cpp's names: all experts of a layer in one, gate and up apart."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, model.config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"{prefix}gate_proj": gate, f"{prefix}up_proj": up}
        else:
            tensors[name.removesuffix(".weight")] = tensor
    return {f"{names.get_name(name)}.weight": tensor for name, tensor in tensors.items()}


def write(model: Qwen3MoeForCausalLM, path: Path, quantisation: str) -> Path:
    """Writes the model and rounds its own weights to what the file holds."""
    config = model.config
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in stored_tensors(model).items():
        kind = stored_type(tuple(tensor.shape), quantisation)
        packed = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        tensor.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind))))
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0", "Q4_0"])
def test_logits_are_those_of_transformers(quantisation: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "saved", norm_topk_prob=True)
    path = write(model, tmp_path / "model.gguf", quantisation)
    sequences = random_sequences(model.config.vocab_size, (1, 9, 24, 47))
    engine = TeacherForcedEngine(path)
    found = engine.logits(sequences, num_prompt_tokens=NUM_PROMPT_TOKENS, chunk=7)
    assert largest_difference(found, transformers_logits(model, sequences)) < 1e-4
    stored = open_gguf(path).tensors["model.layers.0.mlp.experts.down_proj.weight"]
    assert stored.shape == (8, 64, 32) and stored.storage_type == GGMLQuantizationType[quantisation].name


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0"])
def test_a_part_of_one_expert(quantisation: str, tmp_path: Path) -> None:
    """Rows, columns that cut blocks, and all of it."""
    path = write(tiny_model(tmp_path / "saved"), tmp_path / "model.gguf", quantisation)
    weights, name = FileWeights(open_gguf(path)), "model.layers.1.mlp.experts.down_proj.weight"
    stack = weights.load(name, torch.float32)
    assert torch.equal(weights.load(name, torch.float32, member=7), stack[7])
    for dim, size in ((0, 64), (1, 32)):
        part = weights.load(name, torch.float32, dim=dim, start=5, length=size - 9, member=3)
        assert torch.equal(part, stack[3].narrow(dim, 5, size - 9))
    with pytest.raises(ModelFileError, match=r"of shape \(8, 64, 32\) has no matrix 8"):
        weights.load(name, torch.float32, member=8)
    with pytest.raises(ModelFileError, match=r"has no matrix 0"):
        weights.load("model.norm.weight", torch.float32, member=0)


def test_experts_of_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_expert_count(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="experts in 'llama' are not supported, only in 'qwen3moe'"):
        open_gguf(tmp_path / "model.gguf")
