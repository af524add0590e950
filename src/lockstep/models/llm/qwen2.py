"""Qwen 2 and 2.5: Llama's shape with biases on the query, key and value products. Yang et al., 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.layers.build import Build
from lockstep.models.llm.decoder import DecoderConfig, layer_windows
from lockstep.models.llm.llama import LlamaModel


class Qwen2Model(LlamaModel):
    """Llama with biased query, key and value products; the upper layers may slide."""

    architectures = ("Qwen2ForCausalLM",)

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> Qwen2Model:
        parsed = DecoderConfig.parse(config)
        return cls(build, parsed, windows=layer_windows(config, parsed.num_hidden_layers), qkv_bias=True)
