"""Gemma 3, text only: sliding and full layers, norms on both sides of each block. Gemma Team, 2025.

Norm weights are stored minus one; embeddings are scaled by sqrt(D); sliding layers rotate with their own base.
Shapes: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lockstep.attention.backend import AttentionSpec
from lockstep.core.errors import ModelFileError
from lockstep.layers.attention import SelfAttention
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.embedding import VocabEmbedding
from lockstep.layers.heads import CosSin
from lockstep.layers.mlp import GatedMLP
from lockstep.layers.norm import NormSpec, RMSNorm
from lockstep.layers.rope import RopeSpec, RotaryEmbedding
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import (
    DecoderConfig,
    DecoderModel,
    layer_windows,
    make_head,
    outline_decoder,
)
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline
from lockstep.parallel.placement import reduce

_UNLESS_TOLD: Mapping[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}


class Gemma3Layer:
    """Each block's output is normalised before it is added, so its sum is resolved first."""

    def __init__(
        self,
        build: Build,
        where: str,
        config: DecoderConfig,
        *,
        last: bool,
        window: int,
        scale: float,
        soft_cap: float,
        bias: bool,
    ) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        self.slides = window > 0
        self._mesh = build.mesh
        self._attention = SelfAttention(
            build,
            f"{where}.self_attn",
            norm=NormSpec(f"{where}.input_layernorm", width, eps, stored_minus_one=True),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            spec=AttentionSpec(scale=scale, window=window, soft_cap=soft_cap),
            qkv_bias=bias,
            out_bias=bias,
            head_norms=True,
            adds=False,
            selects=last,
        )
        self._post_attention = RMSNorm(
            build, f"{where}.post_attention_layernorm", width, eps, stored_minus_one=True
        )
        self._mlp = GatedMLP(
            build,
            f"{where}.mlp",
            norm=NormSpec(f"{where}.pre_feedforward_layernorm", width, eps, stored_minus_one=True),
            inner_size=config.intermediate_size,
            activation=config.hidden_act,
        )
        self._post_mlp = RMSNorm(
            build, f"{where}.post_feedforward_layernorm", width, eps, stored_minus_one=True
        )

    def __call__(self, ctx: ForwardContext, residual_TD: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """The residual stream after this block."""
        attended, residual_TD = self._attention(ctx, None, residual_TD, cos_sin)
        update_TD = self._post_attention(reduce(attended, self._mesh))
        computed, residual_TD = self._mlp(ctx, update_TD, residual_TD)
        return residual_TD + self._post_mlp(reduce(computed, self._mesh))

    def outline(self) -> BlockOutline:
        """What it computes, for a kernel of a whole decoder; rotation 0 is the full layers', 1 the sliding ones'."""
        return BlockOutline(
            *self._attention.outline(rope=int(self.slides)),
            *self._mlp.outline(),
            self._post_attention.outline(),
            self._post_mlp.outline(),
        )


class Gemma3Model(DecoderModel):
    """Embedding, blocks with two rotary bases, final norm, head."""

    architectures = ("Gemma3ForCausalLM",)
    has_outline = True

    def __init__(self, build: Build, config: DecoderConfig, settings: Mapping[str, Any]) -> None:
        self.config = config
        self._mesh = build.mesh
        width = config.hidden_size
        self._embedding = VocabEmbedding(
            build, "model.embed_tokens", config.vocab_size, width, scale=width**0.5
        )
        local = RopeSpec(
            float(settings.get("rope_local_base_freq") or 1e4), config.head_dim, config.max_position_embeddings
        )
        self._rotary = RotaryEmbedding(build, config.rope)
        self._local_rotary = RotaryEmbedding(build, local)
        scale = float(settings.get("query_pre_attn_scalar") or config.head_dim) ** -0.5
        self._layers = [
            Gemma3Layer(
                build,
                f"model.layers.{index}",
                config,
                last=index == config.num_hidden_layers - 1,
                window=window,
                scale=scale,
                soft_cap=float(settings.get("attn_logit_softcapping") or 0.0),
                bias=bool(settings.get("attention_bias", False)),
            )
            for index, window in enumerate(layer_windows(settings, config.num_hidden_layers, period=6))
        ]
        self._norm = RMSNorm(build, "model.norm", width, config.rms_norm_eps, stored_minus_one=True)
        self.head = make_head(build, config, soft_cap=float(settings.get("final_logit_softcapping") or 0.0))

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> Gemma3Model:
        # Gemma ties its embeddings unless told otherwise, and says so by silence.
        settings = {**_UNLESS_TOLD, **config}
        settings["hidden_act"] = settings["hidden_activation"]
        settings.setdefault("rope_theta", 1e6)
        if settings.get("use_bidirectional_attention"):
            raise ModelFileError("Gemma 3 with bidirectional attention is not supported")
        return cls(build, DecoderConfig.parse(settings), settings)

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        residual_TD = reduce(self._embedding(tokens.ids()), self._mesh)
        everywhere, nearby = self._rotary.at(ctx.positions_T), self._local_rotary.at(ctx.positions_T)
        for layer in self._layers:
            residual_TD = layer(ctx, residual_TD, nearby if layer.slides else everywhere)
        return self._norm(residual_TD)

    def outline(self) -> DecoderOutline:
        return outline_decoder(
            self.config,
            self._embedding,
            (self._rotary, self._local_rotary),
            [layer.outline() for layer in self._layers],
            self._norm.outline(),
            self.head,
        )
