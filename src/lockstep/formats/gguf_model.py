"""A GGUF file as a model: Hugging Face's names, and a config.json rebuilt from the metadata.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What converters change on the way in (the
row order of Llama's Q and K, Gemma's norms plus one) is recorded in each TensorInfo.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from lockstep.core.errors import ModelFileError, nearest
from lockstep.core.request import Pooling
from lockstep.formats.gguf_reader import GgufHeader, read_f32, read_gguf_header
from lockstep.formats.model_files import ModelFiles, TensorInfo, index_tensors
from lockstep.formats.rope import llama3_scaling
from lockstep.formats.storage import StoredTensor

_MODEL_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_GEMMA_BLOCK_NAMES = _BLOCK_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"

# Tokens that end a turn in the chat formats of these families; files often name only one of several.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_CONTROL_TOKEN = 3

_POOLING: dict[int, Pooling] = {1: "mean", 3: "last"}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def open_gguf(path: Path) -> ModelFiles:
    """Opens one .gguf file. Raises ModelFileError when it is broken or its architecture is not supported."""
    header = read_gguf_header(path)
    metadata = _Metadata(path, header.metadata)
    architecture = metadata.text("general.architecture")
    if architecture not in _MODEL_CLASSES:
        known = ", ".join(_MODEL_CLASSES)
        hint = nearest(architecture[:32], _MODEL_CLASSES)
        raise ModelFileError(
            f"{path}: architecture {reprlib.repr(architecture)} is not supported, only {known}{hint}"
        )
    if metadata.number(f"{architecture}.expert_count", 0) and architecture != "qwen3moe":
        raise ModelFileError(f"{path}: experts in {architecture!r} are not supported, only in 'qwen3moe'")
    config = _config(architecture, metadata, header)
    infos = [
        _tensor_info(path, tensor, architecture, config["head_dim"])
        for tensor in header.tensors
        if tensor.name != _ROPE_FACTORS  # It became config["rope_scaling"].
    ]
    eos_token_ids = _eos_token_ids(metadata)
    bos_token_id = metadata.token_id("bos")
    return ModelFiles(
        path=path,
        kind="gguf",
        name=path.stem,
        config=config | {"eos_token_id": list(eos_token_ids), "bos_token_id": bos_token_id},
        generation_config=_generation_config(metadata, eos_token_ids, bos_token_id),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        pooling=_POOLING.get(metadata.number(f"{architecture}.pooling_type", 0)),
        tensors=index_tensors(path, infos),
        metadata=header.metadata,
    )


_HARMLESS = {
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
}
"""Settings of other architectures, and the values with which they change nothing; the first is that of silence."""


class _Metadata:
    """Typed look-ups in the key-value table, with refusals that name the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}; convert the model again")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self.error(f"metadata {key!r} must be text, not {reprlib.repr(value)}")
        return value

    def number(self, key: str, *default: Any) -> Any:
        """A number; without a default it must be there. A list of one repeated number counts as that number."""
        value = self._values.get(key)
        if value is None and default:
            return default[0]
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = "is missing" if value is None else f"must be a number, not {reprlib.repr(value)}"
            raise self.error(f"metadata {key!r} {found}")
        return value

    def count(self, key: str, *default: int) -> int:
        value = self.number(key, *default)
        if not isinstance(value, int) or value < 1:
            raise self.error(f"metadata {key!r} must be a positive integer, not {value!r}")
        return value

    def positive(self, key: str, *default: float) -> float:
        value = self.number(key, *default)
        if not isfinite(value) or value <= 0:
            raise self.error(f"metadata {key!r} must be positive, not {value!r}")
        return float(value)

    def token_id(self, role: str) -> int | None:
        value = self.number(f"tokenizer.ggml.{role}_token_id", None)
        return value if isinstance(value, int) and value >= 0 else None


def _config(architecture: str, metadata: _Metadata, header: GgufHeader) -> dict[str, Any]:
    """config.json as Hugging Face would have it, as far as the file states it."""
    model_type, class_name = _MODEL_CLASSES[architecture]
    prefix = architecture
    hidden_size = metadata.count(f"{prefix}.embedding_length")
    num_heads = metadata.count(f"{prefix}.attention.head_count")
    stored = {tensor.name: tensor for tensor in header.tensors}
    theta = metadata.positive(f"{prefix}.rope.freq_base", 1e4)
    num_layers = metadata.count(f"{prefix}.block_count")
    if num_layers > len(stored):
        raise metadata.error(f"{num_layers} layers are declared but only {len(stored)} tensors are stored")
    _refuse_other_maths(prefix, metadata)
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count(f"{prefix}.attention.head_count_kv", num_heads),
        "head_dim": metadata.count(f"{prefix}.attention.key_length", max(1, hidden_size // num_heads)),
        "max_position_embeddings": metadata.count(f"{prefix}.context_length"),
        "rms_norm_eps": metadata.positive(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _stored_factors(metadata, stored, theta) or _rope_scaling(prefix, metadata),
        "vocab_size": _vocab_size(prefix, metadata, stored),
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "hidden_act": "silu",
    }
    if architecture == "gemma3":
        return config | _gemma3_config(metadata, config)
    return config | _qwen3moe_config(metadata) if architecture == "qwen3moe" else config


def _refuse_other_maths(prefix: str, metadata: _Metadata) -> None:
    """Raises ModelFileError for settings that change what these architectures usually compute."""
    if metadata.get(f"{prefix}.attention.causal") is False:
        raise metadata.error("models whose tokens see later ones (attention.causal) are not supported")
    width = metadata.number(f"{prefix}.rope.dimension_count", None)
    hidden_size, num_heads = (
        metadata.count(f"{prefix}.{name}") for name in ("embedding_length", "attention.head_count")
    )
    head_dim = metadata.count(f"{prefix}.attention.key_length", max(1, hidden_size // num_heads))
    if width is not None and width != head_dim:
        raise metadata.error(f"heads of {head_dim} of which {width} are rotated are not supported")
    for name, harmless in _HARMLESS.items():
        value = metadata.number(f"{prefix}.{name}", harmless[0])
        if value not in harmless:
            raise metadata.error(f"{name} {value:g} is not supported")


def _qwen3moe_config(metadata: _Metadata) -> dict[str, Any]:
    """What mixtures of experts add. llama.cpp's qwen3moe graph routes every layer and renormalises the weights."""
    return {
        "num_experts": metadata.count("qwen3moe.expert_count"),
        "num_experts_per_tok": metadata.count("qwen3moe.expert_used_count"),
        "moe_intermediate_size": metadata.count("qwen3moe.expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma3_config(metadata: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 3 adds. Files from older converters leave the constants of llama.cpp's gemma3 graph unsaid."""
    num_layers = config["num_hidden_layers"]
    pattern = metadata.get("gemma3.attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        period = metadata.count("gemma3.attention.sliding_window_pattern", 6)
        pattern = [(layer + 1) % period != 0 for layer in range(num_layers)]
    if len(pattern) != num_layers:
        raise metadata.error(f"the sliding window pattern names {len(pattern)} layers of {num_layers}")
    # Only the 27B model, the one with 62 layers, scales its queries by something other than its head size.
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": metadata.count("gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "rope_theta": metadata.positive("gemma3.rope.freq_base", 1e6),
        "rope_local_base_freq": metadata.positive("gemma3.rope.freq_base_swa", 1e4),
        "query_pre_attn_scalar": per_head if num_layers == 62 else config["head_dim"],
        "final_logit_softcapping": metadata.number("gemma3.final_logit_softcapping", None),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _vocab_size(prefix: str, metadata: _Metadata, stored: Mapping[str, StoredTensor]) -> int:
    """Rows of the embedding; the metadata may count fewer tokens than the padded matrix has rows."""
    embedding = stored.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    return metadata.count(f"{prefix}.vocab_size", len(tokens) if isinstance(tokens, list) else 0)


def _rope_scaling(prefix: str, metadata: _Metadata) -> dict[str, Any] | None:
    # Older files name no type, and the oldest have the factor under a name of its own.
    kind = metadata.get(f"{prefix}.rope.scaling.type") or "linear"
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise metadata.error(f"rope scaling {kind!r} is not supported, only linear, yarn and llama3's factors")
    factor = metadata.number(f"{prefix}.rope.scaling.factor", None)
    if factor is None:
        factor = metadata.number(f"{prefix}.rope.scale_linear", None)
    # 0 says that there is none.
    scaling = {"rope_type": kind, "factor": float(factor or 1.0)}
    if kind == "linear":
        return scaling if scaling["factor"] != 1.0 else None
    optional = {
        "original_max_position_embeddings": "original_context_length",
        "attention_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    for name, key in optional.items():
        value = metadata.number(f"{prefix}.rope.scaling.{key}", None)
        if value is not None:
            scaling[name] = value
    return scaling


def _stored_factors(
    metadata: _Metadata, stored: Mapping[str, StoredTensor], theta: float
) -> dict[str, Any] | None:
    """llama3 scaling, which GGUF keeps as a tensor of frequency factors."""
    tensor = stored.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.storage_type != "F32" or len(tensor.shape) != 1:
        raise metadata.error(f"{_ROPE_FACTORS} must be a vector of F32")
    try:
        return llama3_scaling(read_f32(metadata.path, tensor), theta)
    except (ValueError, ArithmeticError) as error:
        raise metadata.error(f"{_ROPE_FACTORS} holds a rope scaling that is not supported ({error})") from error


def _tensor_info(path: Path, tensor: StoredTensor, architecture: str, head_dim: int) -> TensorInfo:
    is_rotary = architecture == "llama" and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", tensor.name)
    if is_rotary and (head_dim % 2 or tensor.shape[0] % head_dim):
        raise ModelFileError(
            f"{path}: {tensor.name!r} has {tensor.shape[0]} rows, not whole heads of {head_dim}"
        )
    is_shifted = architecture == "gemma3" and tensor.name.endswith("norm.weight")
    return TensorInfo(
        name=canonical_name(tensor.name, architecture),
        storage_type=tensor.storage_type,
        shape=tensor.shape,
        file=path,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
        stored_name=tensor.name,
        interleaved_head_dim=head_dim if is_rotary else 0,
        stored_offset=1.0 if is_shifted else 0.0,
    )


def canonical_name(stored_name: str, architecture: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that the table does not know stays as it is."""
    block = _BLOCK_TENSOR.fullmatch(stored_name)
    if block:
        layer, stem, kind = block.groups()
        names = _GEMMA_BLOCK_NAMES if architecture == "gemma3" else _BLOCK_NAMES
        return f"model.layers.{layer}.{names[stem]}.{kind}" if stem in names else stored_name
    stem, _, kind = stored_name.rpartition(".")
    return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else stored_name


def _eos_token_ids(metadata: _Metadata) -> tuple[int, ...]:
    """The ids that end a generation: those the file names, then the control tokens that end a turn."""
    named = [metadata.token_id(role) for role in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types):
        controls = [index for index, kind in enumerate(types) if kind == _CONTROL_TOKEN]
        named += [index for index in controls if tokens[index] in _TURN_ENDS]
    return tuple(dict.fromkeys(token_id for token_id in named if token_id is not None))


def _generation_config(
    metadata: _Metadata, eos_token_ids: tuple[int, ...], bos_token_id: int | None
) -> dict[str, Any]:
    settings = {name: metadata.number(f"general.sampling.{key}", None) for key, name in _SAMPLING.items()}
    settings |= {"eos_token_id": list(eos_token_ids), "bos_token_id": bos_token_id}
    return {name: value for name, value in settings.items() if value is not None}
