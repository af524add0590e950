"""Writes a GGUF file of a given shape with random weights, to measure speed where no such model is at hand.

    python bench/make_gguf.py OUT.gguf

The shape is that of Qwen2.5-0.5B: matrices in Q4_0, the embedding (which is the head too) in Q8_0, as llama.cpp
would store them. The tokenizer is the embedded model's, with unused tokens added up to the vocabulary's size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants

from lockstep.formats import embedded_model_path, open_model

SEED = 0
STANDARD_DEVIATION = 0.02
"""Of every random weight; Qwen2's own initialisation."""


@dataclass(frozen=True)
class Qwen2Shape:
    """Sizes of a Qwen2 model, under Hugging Face's names."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int = 32_768


QWEN2_HALF_BILLION = Qwen2Shape(
    num_hidden_layers=24,
    hidden_size=896,
    intermediate_size=4_864,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=151_936,
)
"""The config.json of Qwen/Qwen2.5-0.5B."""


def write_random_model(shape: Qwen2Shape, path: Path, *, seed: int = SEED) -> None:
    """Writes the file. Half a billion weights take some ten seconds."""
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, "qwen2", use_temp_file=True)
    _add_settings(writer, shape)
    _add_tokenizer(writer, shape.vocab_size, open_model(embedded_model_path()).metadata)
    draws = np.random.default_rng(seed)
    for name, size, kind in tensors(shape):
        values = draws.standard_normal(size, dtype=np.float32) * np.float32(STANDARD_DEVIATION)
        if name.endswith("norm.weight"):
            values += 1
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def tensors(shape: Qwen2Shape) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Name, shape (outermost dim first) and storage type of every tensor. Vectors stay in float32."""
    model, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = (count * shape.head_dim for count in (shape.num_attention_heads, shape.num_key_value_heads))
    plain, small, wide = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    yield "token_embd.weight", (shape.vocab_size, model), wide
    for layer in range(shape.num_hidden_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (model,), plain
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.attn_{part}.weight", (rows, model), small
            yield f"{block}.attn_{part}.bias", (rows,), plain
        yield f"{block}.attn_output.weight", (model, queries), small
        yield f"{block}.ffn_norm.weight", (model,), plain
        yield f"{block}.ffn_gate.weight", (inner, model), small
        yield f"{block}.ffn_up.weight", (inner, model), small
        yield f"{block}.ffn_down.weight", (model, inner), small
    yield "output_norm.weight", (model,), plain


def _add_settings(writer: GGUFWriter, shape: Qwen2Shape) -> None:
    writer.add_name(f"random weights, {shape.num_hidden_layers} layers of {shape.hidden_size}")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_vocab_size(shape.vocab_size)


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, donor: Mapping[str, Any]) -> None:
    """The donor's tokenizer, its vocabulary cut or filled up to `vocab_size`."""
    tokens = list(donor["tokenizer.ggml.tokens"])
    types = [int(kind) for kind in donor["tokenizer.ggml.token_type"]]
    num_missing = max(0, vocab_size - len(tokens))
    writer.add_tokenizer_model(donor["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(donor["tokenizer.ggml.pre"])
    writer.add_token_list([*tokens, *(f"<|unused_{at}|>" for at in range(num_missing))][:vocab_size])
    writer.add_token_types([*types, *[TokenType.UNUSED] * num_missing][:vocab_size])
    writer.add_token_merges(donor["tokenizer.ggml.merges"])
    writer.add_bos_token_id(donor["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(donor["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(donor["tokenizer.chat_template"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_random_model(QWEN2_HALF_BILLION, arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
