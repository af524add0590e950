"""Generated calls of norm_rope_attention_decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lockstep.ops.attention_extend.cases import Layer, paged_inputs
from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Case, Signature
from lockstep.ops.norm_rope_attention_decode.reference import new_slots

_GARBAGE = 8.0
"""Size of what the pools hold where new tokens belong: beside keys and values of size one it shows in any length."""

_CALLS: tuple[tuple[Layer, tuple[int, ...]], ...] = (
    (Layer(1, 1, 64, 16), (1,)),
    (Layer(4, 2, 64, 16), (0, 1, 15, 16, 17, 31, 33)),
    (Layer(16, 8, 128, 16), (1, 16, 17, 300)),
    (Layer(3, 1, 64, 32), (32, 33, 31, 0, 64)),
    (Layer(8, 2, 128, 32), (33, 1, 64, 5)),
    (Layer(20, 4, 128, 16), (33, 48, 2)),
    (Layer(10, 2, 64, 64), (64, 65, 63)),
    (Layer(6, 1, 128, 16), (47, 49)),
    (Layer(7, 1, 64, 16), (150, 16)),
    (Layer(14, 2, 128, 48), (48, 49, 144)),
    (Layer(8, 1, 128, 64), (64, 129, 200)),
    (Layer(32, 4, 128, 16), (0, 257, 0, 31)),
    (Layer(9, 1, 64, 16), (20, 33)),
    (Layer(10, 1, 32, 16), (16, 33)),
    (Layer(12, 1, 64, 1), (17, 3)),
    (Layer(32, 2, 32, 16), (40, 3)),
    (Layer(2, 1, 80, 1), (1, 2, 33, 0)),
    (Layer(8, 2, 80, 16), (31, 32, 33)),
    (Layer(3, 3, 256, 16), (17, 1)),
    (Layer(128, 16, 64, 16), (18, 1)),
    (Layer(10, 2, 80, 16, window=12), (37, 12, 13, 11)),
    (Layer(16, 2, 64, 64, window=1), (65, 64, 1)),
    (Layer(4, 4, 32, 1, soft_cap=5.0), (33, 5)),
    (Layer(9, 3, 64, 16, sinks=True), (0, 40, 1)),
    (Layer(8, 2, 128, 32, window=20, soft_cap=3.0, sinks=True), (33, 1, 70)),
)
"""Keys of each sequence, its new one included: that is the first or the last of its page, alone, or padding."""


def cases() -> Iterator[Case]:
    """Calls that reach every kind of layer, alignment and length."""
    plain, few = Layer(4, 2), (20, 0, 33)
    for dtype in DTYPES:
        for layer, num_keys in _CALLS:
            for has_norms in (False, True):
                yield case(dtype, layer, num_keys, has_norms=has_norms)
        yield case(dtype, plain, ())
        yield case(dtype, plain, (0,))
        yield case(dtype, plain, few, has_norms=True, num_spare_pages=2)
        yield case(dtype, plain, few, pages_first=True)
        yield case(dtype, plain, few, packed=True)
        yield case(dtype, plain, (3001,), has_norms=True)
        yield case(dtype, Layer(8, 1, 128, 32), (2000, 1030), has_norms=True)
        yield case(dtype, Layer(16, 4, 128), (33, 40, 49), has_norms=True, num_shared_pages=2)
        yield case(dtype, Layer(3, 1, 64, 1), (9, 7, 30), num_shared_pages=6)
        # Enough sequences that none needs splitting.
        yield case(dtype, Layer(16, 8), tuple(7 * row % 41 for row in range(41)), has_norms=True)
        for size in (0.0, 1e-3, 1e3):
            yield case(dtype, plain, few, has_norms=True, size=size)
        if dtype != torch.float32:
            yield case(dtype, plain, few, has_norms=True, weight_dtype=torch.float32)
            yield case(dtype, plain, few, pool_dtype=torch.float32)


def case(
    dtype: torch.dtype,
    layer: Layer,
    num_keys: Sequence[int],
    *,
    has_norms: bool = False,
    weight_dtype: torch.dtype | None = None,
    pool_dtype: torch.dtype | None = None,
    packed: bool = False,
    size: float = 1.0,
    num_shared_pages: int = 0,
    **options: Any,
) -> Case:
    """A call with random values for sequences of so many keys, their new ones included.

    `packed` heads have no gaps between rows, `size` is that of new heads, the first `num_shared_pages` are
    the same for all sequences; `options` are those of `paged_inputs`.
    """
    of_pool = pool_dtype or dtype
    of_weights = (weight_dtype or dtype) if has_norms else None

    def make(g: torch.Generator) -> tuple[Any, ...]:
        made = paged_inputs(g, layer, of_pool, len(num_keys), num_keys, **options)
        made.page_table_BP[1:, :num_shared_pages] = made.page_table_BP[:1, :num_shared_pages]
        pools = (made.k_KPSH, made.v_KPSH)
        _spoil_new_slots(g, pools, new_slots(made.page_table_BP, made.num_keys_B, layer.page_size))
        heads_BAH = _new_heads(g, layer, len(num_keys), dtype, size, packed)
        weights = (
            None if of_weights is None else normal(g, layer.head_dim, dtype=of_weights, scale=0.1) + 1
            for _ in range(2)
        )
        angles = torch.rand(len(num_keys), layer.head_dim // 2, generator=g) * 100
        where = (*pools, made.page_table_BP, made.num_keys_B)
        how = (layer.scale, layer.window, layer.soft_cap)
        return heads_BAH, *weights, 1e-6, angles.cos(), angles.sin(), *where, made.sinks_N, made.out_TNH, *how

    given = {
        "weights": weight_dtype,
        "pool": pool_dtype,
        "packed": packed,
        "size": f"{size:g}" if size != 1 else "",
        "shared pages": num_shared_pages,
        **options,
    }
    notes = "".join(f", {name} {value}" for name, value in given.items() if value)
    lengths = num_keys if len(num_keys) < 8 else f"{len(num_keys)} sequences up to {max(num_keys)}"
    name = f"{dtype} {layer} {lengths}{', norms' * has_norms}{notes}"
    return Case(name, _signature(layer, dtype, of_pool, of_weights), make)


def timed(sequences: int) -> Case:
    """The call that kernels are timed with."""
    return case(torch.bfloat16, Layer(32, 8, 128, 16), (1024,) * sequences, has_norms=True)


def _signature(
    layer: Layer, dtype: torch.dtype, pool_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> Signature:
    return {**layer.signature(dtype), "pool_dtype": pool_dtype, "weight_dtype": weight_dtype}


def _new_heads(
    g: torch.Generator, layer: Layer, rows: int, dtype: torch.dtype, size: float, packed: bool
) -> torch.Tensor:
    """[B, A, H]: queries and keys of this size, then values of this size or one, which is the most that is expected."""
    num_turned = layer.heads + layer.kv_heads
    sizes = torch.tensor([size] * num_turned + [min(size, 1.0)] * layer.kv_heads)
    heads = torch.randn(rows, len(sizes), layer.head_dim, generator=g) * sizes[:, None]
    flat = heads.to(dtype).flatten(1)
    return (flat if packed else strided(flat)).unflatten(1, (-1, layer.head_dim))


def _spoil_new_slots(
    g: torch.Generator, pools: tuple[torch.Tensor, torch.Tensor], slots_B: torch.Tensor
) -> None:
    taken = slots_B[slots_B >= 0]
    for pool in pools:
        num_heads, _, page_size, head_dim = pool.shape
        garbage = normal(g, num_heads, len(taken), head_dim, dtype=pool.dtype, scale=_GARBAGE)
        pool[:, taken // page_size, taken % page_size] = garbage
