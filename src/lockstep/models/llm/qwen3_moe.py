"""Qwen 3 with mixtures of experts: Qwen 3 whose feed-forward blocks, all or some, are routed. Yang et al., 2025.

Shapes: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.attention.backend import AttentionSpec
from lockstep.core.errors import ModelFileError
from lockstep.layers.attention import SelfAttention
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.embedding import VocabEmbedding
from lockstep.layers.entry import Entry
from lockstep.layers.heads import CosSin
from lockstep.layers.mlp import GatedMLP
from lockstep.layers.moe import MoE
from lockstep.layers.norm import AddRMSNorm, NormSpec
from lockstep.layers.rope import RotaryEmbedding
from lockstep.layers.tokens import Tokens
from lockstep.models.llm.decoder import DecoderConfig, DecoderModel, layer_windows, make_head
from lockstep.parallel.placement import Partial


@dataclass(frozen=True)
class ExpertsConfig:
    """Which layers are routed, and how."""

    num_experts: int
    top_k: int
    inner_size: int
    renormalise: bool
    sparse_layers: frozenset[int]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> ExpertsConfig:
        """From a config.json. Raises ModelFileError naming a setting that is missing or impossible."""
        # Newer files count their experts under the second name.
        num_experts = config.get("num_experts", config.get("num_local_experts"))
        sizes = {
            "num_experts": num_experts,
            "num_experts_per_tok": config.get("num_experts_per_tok"),
            "moe_intermediate_size": config.get("moe_intermediate_size"),
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ModelFileError(f"the model's config needs a positive {name!r}, not {size!r}")
        if sizes["num_experts_per_tok"] > sizes["num_experts"]:
            raise ModelFileError(
                f"each token wants {sizes['num_experts_per_tok']} experts, but the model has {num_experts}"
            )
        activation = config.get("hidden_act") or "silu"
        if activation != "silu":
            raise ModelFileError(f"experts with activation {activation!r} are not supported, only silu")
        step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
        return cls(
            num_experts=sizes["num_experts"],
            top_k=sizes["num_experts_per_tok"],
            inner_size=sizes["moe_intermediate_size"],
            renormalise=bool(config.get("norm_topk_prob", False)),
            sparse_layers=frozenset(
                layer
                for layer in range(config["num_hidden_layers"])
                if layer not in dense and (layer + 1) % step == 0
            ),
        )


class Qwen3MoeLayer:
    """Attention, then a routed or a dense block; each adds the update before it and normalises the sum."""

    def __init__(
        self,
        build: Build,
        where: str,
        config: DecoderConfig,
        experts: ExpertsConfig | None,
        *,
        last: bool,
        window: int,
        attention_bias: bool,
    ) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        post_norm = NormSpec(f"{where}.post_attention_layernorm", width, eps)
        self._attention = SelfAttention(
            build,
            f"{where}.self_attn",
            norm=NormSpec(f"{where}.input_layernorm", width, eps),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            spec=AttentionSpec(scale=config.head_dim**-0.5, window=window),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            head_norms=True,
            selects=last,
        )
        self._block: MoE | GatedMLP
        if experts is not None:
            self._block = MoE(
                build,
                f"{where}.mlp",
                norm=post_norm,
                inner_size=experts.inner_size,
                num_experts=experts.num_experts,
                top_k=experts.top_k,
                renormalise=experts.renormalise,
            )
        else:
            self._block = GatedMLP(build, f"{where}.mlp", norm=post_norm, inner_size=config.intermediate_size)

    def __call__(
        self, ctx: ForwardContext, update: Partial | torch.Tensor, residual_TD: torch.Tensor, cos_sin: CosSin
    ) -> tuple[Partial, torch.Tensor]:
        """The next update, still partial, and the residual stream [T, D] without it."""
        return self._block(ctx, *self._attention(ctx, update, residual_TD, cos_sin))


class Qwen3MoeModel(DecoderModel):
    """Embedding, blocks, final norm, head."""

    architectures = ("Qwen3MoeForCausalLM",)

    def __init__(
        self,
        build: Build,
        config: DecoderConfig,
        experts: ExpertsConfig,
        *,
        windows: tuple[int, ...],
        attention_bias: bool,
    ) -> None:
        self.config = config
        self._embedding = VocabEmbedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._rotary = RotaryEmbedding(build, config.rope)
        self._layers = [
            Qwen3MoeLayer(
                build,
                f"model.layers.{index}",
                config,
                experts if index in experts.sparse_layers else None,
                last=index == config.num_hidden_layers - 1,
                window=window,
                attention_bias=attention_bias,
            )
            for index, window in enumerate(windows)
        ]
        self._norm = AddRMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        self._no_residual = torch.zeros(1, config.hidden_size, dtype=build.dtype, device=build.device)
        self.head = make_head(build, config)
        self._entry = Entry(build, self._embedding, self._rotary)

    @classmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> Qwen3MoeModel:
        parsed = DecoderConfig.parse(config)
        return cls(
            build,
            parsed,
            ExpertsConfig.parse(config),
            # Where windows are used at all, every layer has one: there is no first layer to count from.
            windows=layer_windows({**config, "max_window_layers": 0}, parsed.num_hidden_layers),
            attention_bias=bool(config.get("attention_bias", False)),
        )

    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        # The embedding is the first update of a residual stream that starts at zero.
        update: Partial | torch.Tensor
        update, cos_sin = self._entry(ctx, tokens)
        residual_TD = self._no_residual.repeat(len(tokens), 1)
        for layer in self._layers:
            update, residual_TD = layer(ctx, update, residual_TD, cos_sin)
        return self._norm(update, residual_TD)[0]
