"""Generated decoders and steps, for decoder_forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lockstep.ops.cases import normal
from lockstep.ops.decoder_forward.outline import (
    AttentionOutline,
    BlockOutline,
    DecoderOutline,
    MLPOutline,
    NormOutline,
    ProductOutline,
)
from lockstep.ops.grouped_weight import GroupedWeight

VOCAB_SIZE, NUM_POSITIONS, NUM_FREE_PAGES = 50, 1200, 2

KINDS = {
    "bf16": None,
    "4 bits": (4, 8, 32, False),
    "4 bits, minima": (4, 0, 32, True),
    "8 bits": (8, 128, 32, False),
    "8 bits, minima": (8, 0, 32, True),
    "8 bits by 16": (8, 32, 16, False),
}
"""How weights are held: bits, zero, inputs of a scale, minima."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes and options of a decoder."""

    kind: str = "8 bits"
    num_blocks: int = 2
    hidden_size: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner_size: int = 96
    page_size: int = 16
    window: int = 0
    activation: str = "silu"
    has_bias: bool = False
    has_head_norms: bool = False
    has_outer_norms: bool = False
    soft_cap: float = 0.0

    def __str__(self) -> str:
        flags = (
            ["bias"] * self.has_bias
            + ["head norms"] * self.has_head_norms
            + ["outer norms"] * self.has_outer_norms
        )
        options = [f"window {self.window}"] * bool(self.window) + [self.activation] + flags
        return f"{self.kind}, {self.heads}/{self.kv_heads}x{self.head_dim}, {', '.join(options)}"

    def signature(self, pool_dtype: torch.dtype) -> dict[str, Any]:
        return {
            "dtype": torch.bfloat16,
            "pool_dtype": pool_dtype,
            "head_dim": self.head_dim,
            "inner_size": self.inner_size,
            "num_ranks": 1,
        }


def matrix(generator: torch.Generator, outputs: int, inputs: int, kind: str) -> torch.Tensor | GroupedWeight:
    """A random weight whose outputs have variance one for inputs of variance one."""
    layout = KINDS[kind]
    if layout is None:
        return normal(generator, outputs, inputs, dtype=torch.bfloat16, scale=inputs**-0.5)
    bits, zero, group_inputs, has_minimum = layout
    size, middle = 2**bits, 2 ** (bits - 1) if has_minimum else zero
    q = torch.randint(0, size if zero != 32 else 64, (outputs, inputs), generator=generator, dtype=torch.uint8)
    spread = (64 if zero == 32 else size) / 12**0.5
    scale = torch.rand(outputs, inputs // group_inputs, generator=generator) + 0.5
    # Scales of files are 16-bit numbers.
    scale = (scale * inputs**-0.5 / spread).half().float()
    minimum = (-scale * middle).half().float() if has_minimum else None
    return GroupedWeight(q, scale, minimum, zero, bits)


def outline(generator: torch.Generator, decoder: Decoder) -> DecoderOutline:
    """A random decoder of these sizes."""
    hidden, inner, head_dim = decoder.hidden_size, decoder.inner_size, decoder.head_dim
    heads, kv_heads = decoder.heads, decoder.kv_heads

    def product(outputs: int, inputs: int, *, has_bias: bool = False) -> ProductOutline:
        bias = normal(generator, outputs, dtype=torch.float32) if has_bias else None
        return ProductOutline((matrix(generator, outputs, inputs, decoder.kind),), bias)

    def norm(width: int, wanted: bool = True) -> NormOutline | None:
        return (
            NormOutline(normal(generator, width, dtype=torch.float32, scale=0.2) + 1, 1e-5) if wanted else None
        )

    def block(index: int) -> BlockOutline:
        qkv = product((heads + 2 * kv_heads) * head_dim, hidden, has_bias=decoder.has_bias)
        attention = AttentionOutline(
            qkv,
            product(hidden, heads * head_dim, has_bias=decoder.has_bias),
            rope=index % 2,
            scale=head_dim**-0.5,
            window=decoder.window,
            soft_cap=decoder.soft_cap,
            q_norm=norm(head_dim, decoder.has_head_norms),
            k_norm=norm(head_dim, decoder.has_head_norms),
        )
        input_norm, post_norm = norm(hidden), norm(hidden)
        assert input_norm is not None and post_norm is not None
        mlp = MLPOutline(product(2 * inner, hidden, has_bias=decoder.has_bias), product(hidden, inner))
        outer = (norm(hidden, decoder.has_outer_norms), norm(hidden, decoder.has_outer_norms))
        return BlockOutline(input_norm, attention, post_norm, mlp, *outer)

    last = norm(hidden)
    assert last is not None
    return DecoderOutline(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        inner_size=inner,
        activation=decoder.activation,
        embedding=matrix(generator, VOCAB_SIZE, hidden, decoder.kind),
        embedding_scale=3.0,
        ropes=(_angles(head_dim, 1e4), _angles(head_dim, 1e2)),
        blocks=tuple(block(index) for index in range(decoder.num_blocks)),
        norm=last,
        head=product(VOCAB_SIZE, hidden),
    )


def _angles(head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(NUM_POSITIONS, dtype=torch.float32), theta**-exponents)
    return angles.cos(), angles.sin()


def step(
    generator: torch.Generator, decoder: Decoder, batch: tuple[tuple[int, int], ...], pool_dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of one call: (new tokens, keys) of each sequence, pages in no order, older keys at random."""
    rows, lengths = [num_rows for num_rows, _ in batch], [num_keys for _, num_keys in batch]
    counts = [-(-num_keys // decoder.page_size) for num_keys in lengths]
    num_pages = sum(counts) + NUM_FREE_PAGES
    free = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    table = torch.zeros(len(batch), max(counts, default=0), dtype=torch.int32)
    for row, pages in zip(table, free.split([*counts, NUM_FREE_PAGES]), strict=False):
        row[: len(pages)] = pages
    positions = [torch.arange(keys - new, keys) for new, keys in batch]
    nothing = torch.zeros(0, dtype=torch.int64)
    slots = [
        table[index][where // decoder.page_size].long() * decoder.page_size + where % decoder.page_size
        for index, where in enumerate(positions)
    ]
    shape = (decoder.num_blocks, 2, decoder.kv_heads, num_pages, decoder.page_size, decoder.head_dim)
    return (
        torch.randint(0, VOCAB_SIZE, (sum(rows),), generator=generator),
        torch.cat([nothing, *positions]),
        torch.cat([nothing, *slots]),
        table,
        torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        outline(generator, decoder),
        normal(generator, *shape, dtype=pool_dtype),
    )
