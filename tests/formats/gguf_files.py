"""Tiny models and the GGUF files that llama.cpp's converter would make of them.

Written with the gguf package alone, its name map included: nothing is shared with the reader under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of transformers: 2 layers (Gemma 3: 7), width 64, 4 heads on 2, 96 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7 if architecture == "gemma3" else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": architecture == "gemma3",
    }
    if architecture == "gemma3":
        settings |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
    config_class, model_class = _CLASSES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**settings | overrides)).eval()
    with torch.no_grad():  # Norms start as constants, which would hide a mistake in them.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def stored_type(shape: tuple[int, ...], quantisation: str) -> GGMLQuantizationType:
    """What the converter stores a tensor as: vectors, and rows that are not whole blocks, stay float32."""
    wanted = GGMLQuantizationType[quantisation]
    block_elements, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if len(shape) > 1 and shape[-1] % block_elements == 0 else GGMLQuantizationType.F32


def quantise_in_place(model: PreTrainedModel, quantisation: str) -> None:
    """Rounds the weights to what a GGUF file of this quantisation holds, so that both compare exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            kind = stored_type(tuple(parameter.shape), quantisation)
            packed = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind))))


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    quantisation: str = "F32",
    add: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Writes the model as `path`. `quantisation`: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1. `add` may add
    metadata, such as a tokenizer, before the file is written."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = GGUFWriter(path, architecture)
    _add_settings(writer, model, architecture)
    add(writer)
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        stem, kind = name.rsplit(".", 1)
        stored = stored_type(values.shape, quantisation)
        packed = gguf.quants.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs, as llama.cpp reads Llama's Q and K."""
    heads = np.split(values, num_heads)
    paired = [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in heads]
    return np.concatenate(paired)


def _add_settings(writer: GGUFWriter, model: PreTrainedModel, architecture: str) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        unscaled = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", (unscaled / scaled).astype(np.float32))
