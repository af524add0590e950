"""A model without weights: the matrices that its files would hold, by its config.json.

Building it from shapes would tell as well, but shapes without values cost torch a second and more of imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from lockstep.formats import ModelFiles, TensorInfo
from lockstep.formats.storage import SAFETENSORS_BITS
from lockstep.models.llm.decoder import DecoderConfig
from lockstep.models.llm.qwen3_moe import ExpertsConfig

_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def with_dummy_tensors(files: ModelFiles) -> ModelFiles:
    """The model with its matrices, in the type that its config names (bfloat16 by default). None of them lies anywhere.

    Vectors (norms, biases) are left out: they are less than a thousandth of a model. Raises ModelFileError for a
    config that lacks a size.
    """
    config = files.config
    storage_type = _STORED_AS.get(str(config.get("torch_dtype") or config.get("dtype")), "BF16")
    tensors = {
        name: TensorInfo(
            name=name,
            storage_type=storage_type,
            shape=shape,
            file=files.path,
            offset=0,
            nbytes=prod(shape) * SAFETENSORS_BITS[storage_type] // 8,
            stored_name=name,
        )
        for name, shape in matrices(config)
    }
    return replace(files, tensors=tensors)


def matrices(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the matrices of a decoder, as Hugging Face stores them."""
    sizes = DecoderConfig.parse(config)
    has_experts = bool(config.get("num_experts") or config.get("num_local_experts"))
    experts = ExpertsConfig.parse(config) if has_experts else None
    width, vocabulary = sizes.hidden_size, (sizes.vocab_size, sizes.hidden_size)
    query = sizes.num_attention_heads * sizes.head_dim
    key = sizes.num_key_value_heads * sizes.head_dim
    yield "model.embed_tokens.weight", vocabulary
    for layer in range(sizes.num_hidden_layers):
        where = f"model.layers.{layer}"
        for kind, rows in (("q", query), ("k", key), ("v", key)):
            yield f"{where}.self_attn.{kind}_proj.weight", (rows, width)
        yield f"{where}.self_attn.o_proj.weight", (width, query)
        if experts is not None and layer in experts.sparse_layers:
            yield f"{where}.mlp.gate.weight", (experts.num_experts, width)
            for expert in range(experts.num_experts):
                yield from _gated(f"{where}.mlp.experts.{expert}", width, experts.inner_size)
        else:
            yield from _gated(f"{where}.mlp", width, sizes.intermediate_size)
    if not sizes.tie_word_embeddings:
        yield "lm_head.weight", vocabulary


def _gated(where: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{where}.gate_proj.weight", (inner, width)
    yield f"{where}.up_proj.weight", (inner, width)
    yield f"{where}.down_proj.weight", (width, inner)
