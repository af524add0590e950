"""The embedded model as transformers runs it, its weights read by the gguf package: nothing is shared with Lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.formats import embedded_model_path


@cache
def embedded_weights() -> dict[str, torch.Tensor]:
    """float32 weights under transformers' names."""
    reader = _reader()
    num_heads, num_kv_heads = _field(reader, "attention.head_count"), _field(reader, "attention.head_count_kv")
    stored_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, _field(reader, "block_count"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name in _model(reader, "meta").state_dict():
        stem, kind = name.rsplit(".", 1)
        tensor = tensors.get(f"{stored_names.get_name(stem)}.{kind}")
        if tensor is None:
            assert name == "lm_head.weight", name
            continue
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if ".q_proj." in name:
            values = _uninterleave(values, num_heads)
        if ".k_proj." in name:
            values = _uninterleave(values, num_kv_heads)
        weights[name] = torch.from_numpy(values)
    return weights


def embedded_model() -> LlamaForCausalLM:
    """The model in float32."""
    model = _model(_reader(), "cpu")
    missing, unexpected = model.load_state_dict(embedded_weights(), strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], [])), "only the tied head may be missing"
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def next_token_logits(model: LlamaForCausalLM, tokens: Sequence[int], first: int) -> torch.Tensor:
    """Scores [tokens from `first` on, vocabulary] of what follows each token before the last."""
    return model(torch.tensor([list(tokens)])).logits[0, first - 1 : -1]


@torch.no_grad()
def greedy_answers(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end: int) -> list[list[int]]:
    """What transformers' own generation says to each prompt, all at once, without the end token."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    found = model.generate(
        torch.tensor([[end] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * left + [1] * (longest - left) for left in padding]),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [[token_id for token_id in answer if token_id != end] for answer in found[:, longest:].tolist()]


@cache
def _reader() -> gguf.GGUFReader:
    """Which takes seconds to read the vocabulary."""
    return gguf.GGUFReader(embedded_model_path())


def _model(reader: gguf.GGUFReader, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=_field(reader, "vocab_size"),
        hidden_size=_field(reader, "embedding_length"),
        intermediate_size=_field(reader, "feed_forward_length"),
        num_hidden_layers=_field(reader, "block_count"),
        num_attention_heads=_field(reader, "attention.head_count"),
        num_key_value_heads=_field(reader, "attention.head_count_kv"),
        max_position_embeddings=_field(reader, "context_length"),
        rms_norm_eps=_field(reader, "attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "rope.freq_base")},
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(f"llama.{name}")
    assert field is not None, name
    return field.contents()


def _uninterleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from pairs, as llama.cpp keeps Llama's Q and K, to (first half, second half)."""
    heads = values.reshape(num_heads, -1, 2, values.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
