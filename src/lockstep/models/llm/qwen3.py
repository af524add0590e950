"""Qwen 3 (dense): Llama's shape with an RMS norm on each query and key head. Yang et al., 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.layers.build import Build
from lockstep.models.llm.decoder import DecoderConfig, layer_windows
from lockstep.models.llm.llama import LlamaModel


class Qwen3Model(LlamaModel):
    """Llama with normalised query and key heads."""

    architectures = ("Qwen3ForCausalLM",)

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> Qwen3Model:
        parsed = DecoderConfig.parse(config)
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            build,
            parsed,
            windows=layer_windows(config, parsed.num_hidden_layers),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            head_norms=True,
        )
