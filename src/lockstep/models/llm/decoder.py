"""What every decoder-only language model has in common: its settings, its outline and its forward.

Shapes: T tokens, R rows that are wanted, D model, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lockstep.core.errors import KernelError, ModelFileError
from lockstep.layers.build import Build, ForwardContext
from lockstep.layers.embedding import LMHead, VocabEmbedding
from lockstep.layers.heads import CosSin
from lockstep.layers.rope import RopeSpec, RotaryEmbedding
from lockstep.layers.tokens import Tokens
from lockstep.ops.decoder_forward.outline import BlockOutline, DecoderOutline, NormOutline
from lockstep.parallel.placement import expect_whole


@dataclass(frozen=True)
class DecoderConfig:
    """Settings shared by the architectures, under Hugging Face's names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str
    rope: RopeSpec

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From a config.json with `rope_theta` and `rope_scaling` at its top level.

        Raises ModelFileError naming a setting that is missing.
        """
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        for name in needed:
            if not isinstance(config.get(name), int):
                raise ModelFileError(
                    f"the model's config lacks {name!r}; is this a language model's config.json?"
                )
        if float(config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ModelFileError(
                "models that rotate only a part of each head (partial_rotary_factor) are not supported"
            )
        if config.get("is_causal") is False:
            raise ModelFileError("models whose tokens see later ones (is_causal: false) are not supported")
        quantised = config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
            raise ModelFileError(
                f"weights quantised by {method} (quantization_config) are not supported; take the plain model, "
                "or one in GGUF"
            )
        num_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        positions = int(config.get("max_position_embeddings") or 2048)
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=num_heads,
            num_key_value_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            max_position_embeddings=positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            hidden_act=config.get("hidden_act") or config.get("hidden_activation") or "silu",
            rope=RopeSpec.parse(
                {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta") or 1e4},
                rotated_dim=head_dim,
                max_positions=positions,
            ),
        )


class DecoderModel(ABC):
    """A language model on this rank.

    `forward` gives the hidden rows that are wanted, after the last norm; `logits` turns such rows into scores.
    `has_outline` says that `outline` describes it.
    """

    architectures: ClassVar[tuple[str, ...]]
    has_outline: ClassVar[bool] = False

    config: DecoderConfig
    head: LMHead

    @classmethod
    @abstractmethod
    def make(cls, build: Build, config: Mapping[str, Any]) -> DecoderModel:
        """The model of this config.json, its weights loaded from the build."""

    @abstractmethod
    def forward(self, ctx: ForwardContext, tokens: Tokens) -> torch.Tensor:
        """Hidden rows after the final norm: [T, D], or [R, D], those of `ctx.wanted_R` in that order."""

    def begin(self, ctx: ForwardContext, tokens: Tokens) -> tuple[torch.Tensor, CosSin]:
        """The residual stream [T, D] before the first block, and the angles of its rows, for kernels that compute all
        blocks. Raises KernelError as `outline` does."""
        raise KernelError(f"{type(self).__name__} has parts that no outline of a decoder describes")

    def outline(self) -> DecoderOutline:
        """The model as data, for kernels that compute whole decoders. Raises KernelError for one with other parts."""
        raise KernelError(f"{type(self).__name__} has parts that no outline of a decoder describes")

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Scores [R, V], the same on every rank, in float32 or in the dtype that their product rounds to."""
        return expect_whole(self.head(hidden_RD), "whoever reads the scores")


def make_head(build: Build, config: DecoderConfig, *, soft_cap: float = 0.0) -> LMHead:
    """The head, which shares the embedding's stored weight when the model ties them."""
    name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return LMHead(build, name, config.vocab_size, config.hidden_size, soft_cap=soft_cap)


_OUTLINED_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def outline_decoder(
    config: DecoderConfig,
    embedding: VocabEmbedding,
    ropes: Sequence[RotaryEmbedding],
    blocks: Sequence[BlockOutline],
    norm: NormOutline,
    head: LMHead,
) -> DecoderOutline:
    """A model of this shape as data."""
    return DecoderOutline(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inner_size=config.intermediate_size,
        activation=_OUTLINED_ACTIVATIONS[config.hidden_act],
        embedding=embedding.table.weight,
        embedding_scale=1.0 if embedding.scale is None else embedding.scale,
        ropes=tuple(rope.outline() for rope in ropes),
        blocks=tuple(blocks),
        norm=norm,
        head=head.outline(),
        soft_cap=head.soft_cap,
    )


def layer_windows(config: Mapping[str, Any], num_layers: int, *, period: int = 0) -> tuple[int, ...]:
    """Keys each layer sees, 0 for all, from `layer_types` or the older settings.

    `period` says that every period-th layer is full when the config does not tell (Gemma 3: 6). Without one,
    `use_sliding_window` turns windows on from layer `max_window_layers` up (Qwen 2, where it is 28 unless told).
    Raises ModelFileError when `layer_types` names another number of layers, or kinds that are not known.
    """
    window = int(config.get("sliding_window") or 0)
    if period == 0 and not config.get("use_sliding_window", False):
        window = 0
    kinds = config.get("layer_types")
    if kinds is None:
        period = int(config.get("sliding_window_pattern") or period)
        first = int(config.get("max_window_layers", 28) or 0)
        slides = [(index + 1) % period != 0 if period else index >= first for index in range(num_layers)]
    else:
        if len(kinds) != num_layers:
            raise ModelFileError(f"layer_types names {len(kinds)} layers, but the model has {num_layers}")
        unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
        if unknown:
            raise ModelFileError(f"layers of type {unknown[0]!r} (layer_types) are not supported")
        slides = [kind == "sliding_attention" for kind in kinds]
    return tuple(window if slide else 0 for slide in slides)
