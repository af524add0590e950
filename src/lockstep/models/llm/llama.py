"""Llama and models of its shape (SmolLM2, TinyLlama): Touvron et al., 2023; rope scaling as in Llama 3.1.

Shapes: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lockstep.attention.backend import AttentionSpec
from lockstep.layers.attention import SelfAttention
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.embedding import VocabEmbedding
from lockstep.layers.entry import Entry
from lockstep.layers.heads import CosSin
from lockstep.layers.mlp import GatedMLP
from lockstep.layers.norm import AddRMSNorm, NormSpec
from lockstep.layers.rope import RotaryEmbedding
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderConfig, DecoderModel, make_head, outline_decoder
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline
from lockstep.parallel.placement import Partial


class LlamaLayer:
    """Attention and feed-forward; each adds the update before it and normalises the sum."""

    def __init__(
        self,
        build: Build,
        where: str,
        config: DecoderConfig,
        *,
        first: bool,
        last: bool,
        window: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        head_norms: bool = False,
    ) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        self._attention = SelfAttention(
            build,
            f"{where}.self_attn",
            norm=NormSpec(f"{where}.input_layernorm", width, eps),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            spec=AttentionSpec(scale=config.head_dim**-0.5, window=window),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            head_norms=head_norms,
            # The first block has no update to add.
            adds=not first,
            selects=last,
        )
        self._mlp = GatedMLP(
            build,
            f"{where}.mlp",
            norm=NormSpec(f"{where}.post_attention_layernorm", width, eps),
            inner_size=config.intermediate_size,
            activation=config.hidden_act,
            bias=mlp_bias,
        )

    def __call__(
        self, ctx: ForwardContext, update: Partial | None, residual_TD: torch.Tensor, cos_sin: CosSin
    ) -> tuple[Partial, torch.Tensor]:
        """The next update, still partial, and the residual stream [T, D] without it."""
        return self._mlp(ctx, *self._attention(ctx, update, residual_TD, cos_sin))

    def outline(self) -> BlockOutline:
        """What it computes, for a kernel of a whole decoder."""
        return BlockOutline(*self._attention.outline(rope=0), *self._mlp.outline())


class LlamaModel(DecoderModel):
    """Embedding, blocks, final norm, head."""

    architectures = ("LlamaForCausalLM",)
    has_outline = True

    def __init__(
        self,
        build: Build,
        config: DecoderConfig,
        *,
        windows: tuple[int, ...] = (),
        qkv_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        head_norms: bool = False,
    ) -> None:
        self.config = config
        self._embedding = VocabEmbedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._rotary = RotaryEmbedding(build, config.rope)
        self._layers = [
            LlamaLayer(
                build,
                f"model.layers.{index}",
                config,
                first=index == 0,
                last=index == config.num_hidden_layers - 1,
                window=windows[index] if windows else 0,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                mlp_bias=mlp_bias,
                head_norms=head_norms,
            )
            for index in range(config.num_hidden_layers)
        ]
        self._norm = AddRMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        self.head = make_head(build, config)
        self._entry = Entry(build, self._embedding, self._rotary)

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> LlamaModel:
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            build,
            DecoderConfig.parse(config),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    def begin(self, ctx: ForwardContext, tokens: Tokens) -> tuple[torch.Tensor, CosSin]:
        return self._entry(ctx, tokens)

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        residual_TD, cos_sin = self.begin(ctx, tokens)
        update: Partial | None = None
        for layer in self._layers:
            update, residual_TD = layer(ctx, update, residual_TD, cos_sin)
        assert update is not None
        return self._norm(update, residual_TD)[0]

    def outline(self) -> DecoderOutline:
        blocks = [layer.outline() for layer in self._layers]
        return outline_decoder(
            self.config, self._embedding, (self._rotary,), blocks, self._norm.outline(), self.head
        )
