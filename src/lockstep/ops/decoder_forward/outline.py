"""A whole decoder as data: what each block reads, without layers, ranks or requests.

Weights of products are plain tensors [O, I], GroupedWeights, or what a kernel's `prepare` made of one; other tensors
are plain. Shapes: D model, F inner width, H head dim, V vocabulary, C positions, R2 half of the rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class NormOutline:
    """RMS norm: its weight and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class ProductOutline:
    """x @ weight^T + bias, its weights one after the other in the outputs."""

    weights: tuple[Any, ...]
    bias_O: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionOutline:
    """Query, key and value product, head norms, rotation `rope`, attention over pages, output product."""

    qkv: ProductOutline
    out: ProductOutline
    rope: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    q_norm: NormOutline | None = None
    k_norm: NormOutline | None = None


@dataclass(frozen=True, slots=True)
class MLPOutline:
    """down(activation(gate(x)) * up(x)); gate_up holds the gate's outputs, then as many of up."""

    gate_up: ProductOutline
    down: ProductOutline


@dataclass(frozen=True, slots=True)
class BlockOutline:
    """input norm, attention, [norm], add, post norm, feed-forward, [norm], add."""

    input_norm: NormOutline
    attention: AttentionOutline
    post_norm: NormOutline
    mlp: MLPOutline
    after_attention_norm: NormOutline | None = None
    after_mlp_norm: NormOutline | None = None


@dataclass(frozen=True, slots=True)
class DecoderOutline:
    """Embedding, blocks, last norm, head.

    `activation` is "silu", "gelu" or "gelu_tanh". `ropes` are pairs of cos and sin [C, R2]. `soft_cap` bounds the
    head's scores where it is not 0.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner_size: int
    activation: str
    embedding: Any
    embedding_scale: float
    ropes: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    blocks: tuple[BlockOutline, ...]
    norm: NormOutline
    head: ProductOutline
    soft_cap: float = 0.0
