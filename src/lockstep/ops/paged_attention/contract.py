"""Contract of paged_attention. Its kernels are the attention backends of the room `attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.cases import DTYPES, normal
from lockstep.ops.contract import Argument, Case, Contract, Tolerance
from lockstep.ops.paged_attention.reference import Span, paged_attention

# (start, new tokens) of each sequence: decode alone and together, whole prompts, chunks, and everything mixed.
_BATCHES = (
    ((0, 1),),
    ((37, 1),),
    ((0, 33),),
    ((16, 16), (5, 3)),
    ((100, 1), (3, 1), (31, 1)),
    ((0, 20), (47, 1), (9, 30), (200, 1), (0, 1)),
)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for batch in _BATCHES:
            for heads, kv_heads, page_size, window, soft_cap in (
                (9, 3, 16, 0, 0.0),
                (4, 4, 1, 0, 0.0),
                (8, 1, 16, 12, 0.0),
                (4, 2, 16, 0, 5.0),
            ):

                def make(
                    g: torch.Generator,
                    batch: tuple[tuple[int, int], ...] = batch,
                    sizes: tuple[int, int, int] = (heads, kv_heads, page_size),
                    masks: tuple[int, float] = (window, soft_cap),
                    dtype: torch.dtype = dtype,
                ) -> tuple[Any, ...]:
                    heads, kv_heads, page_size = sizes
                    lengths = [-(-(start + count) // page_size) for start, count in batch]
                    pages = torch.randperm(sum(lengths) + 3, generator=g).tolist()
                    spans = [
                        Span(start, count, [pages.pop() for _ in range(n)])
                        for (start, count), n in zip(batch, lengths, strict=True)
                    ]
                    q = normal(g, sum(count for _, count in batch), heads, 64, dtype=dtype)
                    pools = [
                        normal(g, kv_heads, sum(lengths) + 3, page_size, 64, dtype=dtype) for _ in range(2)
                    ]
                    return q, pools[0], pools[1], spans, 0.125, *masks

                signature = {"dtype": dtype, "head_dim": 64, "heads": heads, "kv_heads": kv_heads}
                signature |= {
                    "page_size": page_size,
                    "window": window,
                    "soft_cap": soft_cap,
                    "pool_dtype": dtype,
                }
                yield Case(
                    f"{dtype} {batch} {heads}/{kv_heads} page {page_size} window {window} cap {soft_cap}",
                    signature,
                    make,
                )


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
    rounding="float32 scores, weights and sums; one rounding to the dtype of q",
    signature=("dtype", "pool_dtype", "head_dim", "heads", "kv_heads", "page_size", "window", "soft_cap"),
    reference=paged_attention,
    cases=_cases,
    # Weights may be rounded to bf16 before the second product, as every fused kernel does.
    tolerance={torch.float32: Tolerance(3e-6, 1e-5), torch.bfloat16: Tolerance(6e-3, 2**-6)},
    mutants={
        "sees one key too many": _sees_the_future,
        "wrong scale": _wrong_scale,
        "pages reversed": _pages_reversed,
    },
)
