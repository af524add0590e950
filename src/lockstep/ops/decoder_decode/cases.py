"""Generated calls of decoder_decode: random decoders, and a new token of each of some sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Case
from lockstep.ops.decoder_forward.cases import matrix
from lockstep.ops.decoder_forward.outline import (
    AttentionOutline,
    BlockOutline,
    DecoderOutline,
    MLPOutline,
    NormOutline,
    ProductOutline,
)

_NUM_FREE_PAGES = 2
_NO_PAGE = -1
"""Fills a page table after a sequence's pages: it must not be followed."""
_GARBAGE = 8.0
"""Size of what the pools hold where no token lies yet: beside keys and values of size one it shows in any length."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes and options of a decoder. `weights` are kept in its dtype, or as decoder_forward's cases call it."""

    hidden_size: int = 256
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 128
    inner_size: int = 256
    page_size: int = 16
    num_blocks: int = 2
    has_bias: bool = False
    has_head_norms: bool = False
    dtype: torch.dtype = torch.bfloat16
    weights: str = ""
    norm_dtype: torch.dtype | None = None
    has_outer_norms: bool = False
    has_every_bias: bool = False
    activation: str = "silu"
    window: int = 0
    soft_cap: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.hidden_size}, {self.heads}/{self.kv_heads}x{self.head_dim}, {self.inner_size}"
        options = {
            f"page {self.page_size}": True,
            f"{self.num_blocks} blocks": self.num_blocks != 2,
            "bias": self.has_bias,
            "head norms": self.has_head_norms,
            self.weights: self.weights,
            f"norms in {self.norm_dtype}": self.norm_dtype,
            "outer norms": self.has_outer_norms,
            "every bias": self.has_every_bias,
            self.activation: self.activation != "silu",
            f"window {self.window}": self.window,
            f"cap {self.soft_cap:g}": self.soft_cap,
        }
        return ", ".join([f"{self.dtype} {sizes}", *(text for text, is_there in options.items() if is_there)])

    @property
    def is_plain(self) -> bool:
        """See signature.py."""
        differs = self.weights or self.norm_dtype or self.has_outer_norms or self.has_every_bias
        return not (differs or self.window or self.soft_cap)

    def signature(self, pool_dtype: torch.dtype) -> dict[str, Any]:
        """As `signature_of` gives it for such a decoder, which need not be made for that."""
        return {
            "dtype": self.dtype,
            "pool_dtype": pool_dtype,
            "hidden_size": self.hidden_size,
            "inner_size": self.inner_size,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "blocks": self.num_blocks,
            "activation": self.activation,
            "plain": self.is_plain,
            "head_norms": self.has_head_norms,
            "qkv_bias": self.has_bias or self.has_every_bias,
            "num_ranks": 1,
        }


_SMALL = Decoder(64, 4, 2, 32, 96, has_bias=True, has_head_norms=True)
_PAIRED = Decoder(512, 4, 2, 64, 768, page_size=32)

_CALLS: tuple[tuple[Decoder, tuple[int, ...]], ...] = (
    *((Decoder(), (keys,)) for keys in (1, 16, 17, 37, 128, 129, 300, 1100, 3000)),
    (Decoder(), ()),
    (Decoder(), (0, 0)),
    (Decoder(), (37, 17)),
    (Decoder(), (300, 1, 64)),
    (Decoder(), (600, 1, 0)),
    (Decoder(), (33, 0, 16, 5)),
    (Decoder(has_head_norms=True), (5, 0, 130, 48, 1, 17, 300, 0)),
    (Decoder(num_blocks=3), (40, 33)),
    (_PAIRED, (65, 32, 31)),
    (replace(_PAIRED, has_head_norms=True), (500,)),
    (replace(_PAIRED, has_bias=True), (33, 2)),
    (replace(_PAIRED, has_bias=True, has_head_norms=True), (64, 1, 200, 31, 33)),
    (Decoder(512, 8, 1, 64, 256, page_size=64), (129, 64, 3)),
    (Decoder(256, 6, 2, 128, 256, has_head_norms=True), (47, 49)),
    (Decoder(256, 4, 4, 64, 512, page_size=48), (48, 49, 7, 144)),
    (Decoder(256, 10, 2, 128, 256, has_bias=True), (90,)),
    (Decoder(256, 16, 8, 64, 256, has_head_norms=True), (33, 2, 0, 100)),
    (Decoder(256, 2, 2, 128, 2304), (20, 33, 1)),
    (Decoder(1024, 4, 2, 64, 1280, has_head_norms=True), (50,)),
    (Decoder(1280, 2, 1, 128, 256), (21, 34, 8, 1, 15)),
    # What kernels may refuse.
    (Decoder(page_size=1), (17, 3)),
    (Decoder(head_dim=80, heads=4, kv_heads=2), (33, 12)),
    (Decoder(weights="8 bits"), (33, 12)),
    (Decoder(norm_dtype=torch.float32), (33, 12)),
    (Decoder(has_outer_norms=True), (33, 12)),
    (Decoder(has_every_bias=True), (33, 12)),
    (Decoder(activation="gelu"), (33, 12)),
    (Decoder(activation="gelu_tanh", window=20), (33, 12)),
    (Decoder(soft_cap=5.0), (33, 12)),
)
"""Keys of each sequence, its new one included: that is the first or the last of its page, alone, or padding."""


def cases() -> Iterator[Case]:
    """Calls that reach every kind of decoder, number of rows and length."""
    for dtype in DTYPES:
        small = replace(_SMALL, dtype=dtype)
        # What most known-wrong versions get wrong.
        yield case(small, (37, 1, 18, 40))
        yield case(small, ())
        yield case(small, (0, 0))
        if dtype != torch.bfloat16:
            yield case(replace(small, has_bias=False, heads=6), (33, 0, 150), size=0.0)
            yield case(replace(small, has_head_norms=False, num_blocks=3), (5, 16, 64), gaps=True)
            yield case(small, (20,), size=100.0)
    for decoder, num_keys in _CALLS:
        yield case(decoder, num_keys)
    plain = Decoder(has_bias=True)
    yield case(plain, (40, 0, 33), gaps=True)
    yield case(plain, (40, 33), num_spare_pages=3)
    yield case(plain, (40, 33, 70), num_shared_pages=2)
    yield case(plain, (40, 33), pool_dtype=torch.float32)
    for size in (0.0, 1e-3, 100.0):
        yield case(plain, (40, 33), size=size)


def case(
    decoder: Decoder,
    num_keys: Sequence[int],
    *,
    size: float = 1.0,
    gaps: bool = False,
    num_spare_pages: int = 0,
    num_shared_pages: int = 0,
    pool_dtype: torch.dtype | None = None,
) -> Case:
    """A call for sequences of so many keys, their new ones included.

    `size` is that of the embedded rows, with `gaps` between them. `num_spare_pages` widen the page table; the first
    `num_shared_pages` are the same for all sequences.
    """
    of_pool = pool_dtype or decoder.dtype

    def make(g: torch.Generator) -> tuple[Any, ...]:
        rows = normal(g, len(num_keys), decoder.hidden_size, dtype=decoder.dtype, scale=size)
        angles = torch.rand(len(num_keys), decoder.head_dim // 2, generator=g) * 100
        table, num_pages = _page_table(g, decoder.page_size, num_keys, num_spare_pages)
        table[1:, :num_shared_pages] = table[:1, :num_shared_pages]
        return (
            strided(rows) if gaps else rows,
            angles.cos(),
            angles.sin(),
            table,
            torch.tensor(num_keys, dtype=torch.int32),
            outline(g, decoder),
            _pools(g, decoder, num_keys, table, num_pages).to(of_pool),
        )

    given = {
        "size": f"{size:g}" if size != 1 else "",
        "gaps": gaps,
        "spare pages": num_spare_pages,
        "shared pages": num_shared_pages,
        "pool": pool_dtype,
    }
    notes = "".join(f", {name} {value}" for name, value in given.items() if value)
    return Case(f"{decoder} {tuple(num_keys)}{notes}", decoder.signature(of_pool), make)


def _page_table(
    g: torch.Generator, page_size: int, num_keys: Sequence[int], num_spare_pages: int
) -> tuple[torch.Tensor, int]:
    """Pages of each sequence in no order, and how many there are with those that nobody has."""
    counts = [-(-keys // page_size) for keys in num_keys]
    num_pages = sum(counts) + _NUM_FREE_PAGES
    free = torch.randperm(num_pages, generator=g, dtype=torch.int32)
    table = torch.full((len(counts), max(counts, default=0) + num_spare_pages), _NO_PAGE, dtype=torch.int32)
    for row, pages in zip(table, free.split([*counts, _NUM_FREE_PAGES]), strict=False):
        row[: len(pages)] = pages
    return table, num_pages


def _pools(
    g: torch.Generator, decoder: Decoder, num_keys: Sequence[int], table: torch.Tensor, num_pages: int
) -> torch.Tensor:
    """[L, 2, K, P, S, H] with garbage wherever no older key or value lies.

    Values are the larger the longer their sequence is, so that attention moves the stream by about its own size: parts
    of a long one that are left out show.
    """
    shape = (decoder.num_blocks, 2, decoder.kv_heads, num_pages, decoder.page_size, decoder.head_dim)
    drawn = torch.randn(shape, generator=g)
    sizes = torch.full((2, num_pages, decoder.page_size), _GARBAGE)
    for pages, keys in zip(table, num_keys, strict=True):
        places = torch.arange(max(keys - 1, 0))
        pages_of = pages[places // decoder.page_size].long()
        sizes[0, pages_of, places % decoder.page_size] = 1.0
        sizes[1, pages_of, places % decoder.page_size] = max(keys, 1) ** 0.5
    return drawn * sizes[:, None, :, :, None]


def outline(generator: torch.Generator, decoder: Decoder) -> DecoderOutline:
    """A random decoder of these sizes."""
    hidden, inner, head_dim = decoder.hidden_size, decoder.inner_size, decoder.head_dim
    heads, kv_heads, dtype = decoder.heads, decoder.kv_heads, decoder.dtype

    def product(outputs: int, inputs: int, *, has_bias: bool = decoder.has_every_bias) -> ProductOutline:
        if decoder.weights:
            weight: Any = matrix(generator, outputs, inputs, decoder.weights)
        else:
            weight = normal(generator, outputs, inputs, dtype=dtype, scale=inputs**-0.5)
        return ProductOutline((weight,), normal(generator, outputs, dtype=dtype) if has_bias else None)

    def norm(width: int) -> NormOutline:
        of_norm = decoder.norm_dtype or dtype
        return NormOutline(normal(generator, width, dtype=of_norm, scale=0.2) + 1, 1e-5)

    def block() -> BlockOutline:
        has_bias = decoder.has_bias or decoder.has_every_bias
        attention = AttentionOutline(
            product((heads + 2 * kv_heads) * head_dim, hidden, has_bias=has_bias),
            product(hidden, heads * head_dim),
            rope=0,
            scale=head_dim**-0.5,
            window=decoder.window,
            soft_cap=decoder.soft_cap,
            q_norm=norm(head_dim) if decoder.has_head_norms else None,
            k_norm=norm(head_dim) if decoder.has_head_norms else None,
        )
        mlp = MLPOutline(product(2 * inner, hidden), product(hidden, inner))
        outer = [norm(hidden) if decoder.has_outer_norms else None for _ in range(2)]
        return BlockOutline(norm(hidden), attention, norm(hidden), mlp, *outer)

    return DecoderOutline(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        inner_size=inner,
        activation=decoder.activation,
        # Neither is used, nor are angles of all positions.
        embedding=torch.zeros(1, hidden, dtype=dtype),
        embedding_scale=3.0,
        ropes=(),
        blocks=tuple(block() for _ in range(decoder.num_blocks)),
        norm=norm(hidden),
        head=ProductOutline((torch.zeros(1, hidden, dtype=dtype),)),
    )
