"""Contract of paged_attention. Its kernels are the attention backends of the room `attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, rounded
from lockstep.ops.paged_attention.reference import Span, paged_attention

_Batch = tuple[tuple[int, int], ...]
"""(start, new tokens) of each sequence."""

# Decode alone and together, whole prompts, chunks, everything mixed, and nothing.
_BATCHES: tuple[_Batch, ...] = (
    ((0, 1),),
    ((37, 1),),
    ((0, 33),),
    ((16, 16), (5, 3)),
    ((100, 1), (3, 1), (31, 1)),
    ((0, 20), (47, 1), (9, 30), (200, 1), (0, 1)),
    (),
)

# Query heads, KV heads, page size, window, soft cap.
_LAYERS = ((9, 3, 16, 0, 0.0), (4, 4, 1, 0, 0.0), (8, 1, 16, 12, 0.0), (4, 2, 16, 0, 5.0))

_NUM_FREE_PAGES = 3
_SCALE = 0.15
"""Not a power of two, so that rounding a scaled query shows."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for batch in _BATCHES:
            for layer in _LAYERS:
                yield _case(dtype, batch, layer)
        # A step padded to a fixed number of rows, and sequences that own pages ahead of their tokens.
        yield _case(dtype, ((37, 1), (4, 1)), _LAYERS[0], num_padding_rows=2)
        yield _case(dtype, ((20, 9),), _LAYERS[0], num_padding_rows=3)
        yield _case(dtype, ((37, 1), (4, 5)), _LAYERS[0], num_spare_pages=2)


def _case(
    dtype: torch.dtype,
    batch: _Batch,
    layer: tuple[int, int, int, int, float],
    *,
    num_padding_rows: int = 0,
    num_spare_pages: int = 0,
) -> Case:
    heads, kv_heads, page_size, window, soft_cap = layer

    def make(g: torch.Generator) -> tuple[Any, ...]:
        counts = [-(-(start + num_tokens) // page_size) + num_spare_pages for start, num_tokens in batch]
        num_pages = sum(counts) + _NUM_FREE_PAGES
        free = torch.randperm(num_pages, generator=g).tolist()
        spans = [
            Span(start, num_tokens, [free.pop() for _ in range(count)])
            for (start, num_tokens), count in zip(batch, counts, strict=True)
        ]
        num_rows = sum(num_tokens for _, num_tokens in batch) + num_padding_rows
        q = normal(g, num_rows, heads, 64, dtype=dtype)
        k, v = (normal(g, kv_heads, num_pages, page_size, 64, dtype=dtype) for _ in range(2))
        return q, k, v, spans, _SCALE, window, soft_cap

    signature = {"dtype": dtype, "pool_dtype": dtype, "head_dim": 64, "heads": heads, "kv_heads": kv_heads}
    signature |= {"page_size": page_size, "window": window, "soft_cap": soft_cap}
    padded = f", {num_padding_rows} rows of padding" * bool(num_padding_rows)
    spare = f", {num_spare_pages} spare pages" * bool(num_spare_pages)
    name = f"{dtype} {batch} heads {heads}/{kv_heads} page {page_size} window {window} cap {soft_cap}{padded}{spare}"
    return Case(name, signature, make)


def _sees_the_future(
    q: Any, k: Any, v: Any, spans: Any, scale: float, window: int, soft_cap: float
) -> torch.Tensor:
    late = [Span(span.start + 1, span.num_tokens, span.page_ids) for span in spans]
    page_size = k.shape[2]
    fits = all(span.num_kv_tokens <= len(span.page_ids) * page_size for span in late)
    return paged_attention(q, k, v, late if fits else spans, scale * (1 if fits else 1.5), window, soft_cap)


def _wrong_scale(
    q: Any, k: Any, v: Any, spans: Any, scale: float, window: int, soft_cap: float
) -> torch.Tensor:
    return paged_attention(q, k, v, spans, scale * 1.1, window, soft_cap)


def _pages_reversed(
    q: Any, k: Any, v: Any, spans: Any, scale: float, window: int, soft_cap: float
) -> torch.Tensor:
    turned = [Span(span.start, span.num_tokens, list(span.page_ids)[::-1]) for span in spans]
    return paged_attention(q, k, v, turned, scale, window, soft_cap)


CONTRACT = Contract(
    name="paged_attention",
    summary="causal attention of new tokens over the keys and values of their sequence's pages",
    arguments=(
        Argument("q", ("token", "head", "head_dim")),
        Argument("k_pool", ("kv_head", "page", "slot", "head_dim")),
        Argument("v_pool", ("kv_head", "page", "slot", "head_dim")),
        Argument("spans", note="one per sequence: start, number of new tokens, page ids"),
        Argument("scale"),
        Argument("window", note="keys a token sees, its own included; 0 for all"),
        Argument("soft_cap", note="cap * tanh(score / cap); 0 for none"),
    ),
    returns=("out[token, head, head_dim]",),
    rounding="float32 scores and sums; the weights may be rounded to the pool's dtype; one rounding to the dtype of q",
    signature=("dtype", "pool_dtype", "head_dim", "heads", "kv_heads", "page_size", "window", "soft_cap"),
    reference=paged_attention,
    cases=_cases,
    # A score, 64 products of size 0.15, walks sqrt(64 / 2) units of about one: four sigmas of that move its weight by
    # 24 units, twice so after the division, and values stay below 4. Weights may be rounded to the dtype before the
    # second product, as fused kernels do: each output then moves by a rounding of sum(weight * |value|), below 4.
    tolerance=rounded(1, maths=4, absolute=2 * 24 * 4 * FLOAT32_UNIT, inside=4.0),
    mutants={
        "sees one key too many": _sees_the_future,
        "wrong scale": _wrong_scale,
        "pages reversed": _pages_reversed,
    },
)
