"""Contract of attention_extend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.attention_extend.cases import LAYERS, Layer, in_turn, paged_inputs
from lockstep.ops.attention_extend.mutants import MUTANTS
from lockstep.ops.attention_extend.reference import attention_extend
from lockstep.ops.cases import DTYPES
from lockstep.ops.contract import FLOAT32_UNIT, Argument, Case, Contract, Workload, rounded

Batch = tuple[tuple[int, int], ...]
"""(new tokens, keys) of each sequence."""

# Whole prompts, chunks, single tokens between them, and sequences of no rows.
_BATCHES: tuple[Batch, ...] = (
    ((33, 33),),
    ((16, 32), (3, 8)),
    ((20, 20), (1, 48), (0, 12), (30, 39), (1, 1)),
    ((5, 130), (65, 65)),
    ((1, 37), (1, 4)),
)


def _cases() -> Iterator[Case]:
    for number, dtype in enumerate(DTYPES):
        for layer, batch in zip(LAYERS, in_turn(number, _BATCHES), strict=False):
            yield case(dtype, layer, batch, num_padding_rows=layer.heads % 3)
        plain = Layer(4, 2)
        yield case(dtype, plain, ())
        yield case(dtype, plain, (), num_padding_rows=3)
        yield case(dtype, plain, ((1, 1),))
        yield case(dtype, plain, ((5, 20), (9, 9)), num_spare_pages=2)
        yield case(dtype, plain, ((9, 20), (3, 3)), slice_rows=True)
        yield case(dtype, plain, ((9, 20), (30, 30)), pages_first=True)
        yield case(dtype, Layer(4, 2, 64, 16), ((9, 20), (1, 1), (30, 65), (5, 5)), unseen="NaN")
        yield case(dtype, Layer(128, 128, 32), ((2, 18),))
        yield case(dtype, Layer(128, 1, 32), ((3, 18),))
        yield case(dtype, plain, ((3, 20),), values="zero queries")
        yield case(dtype, plain, ((3, 20),), values="large queries")
        if dtype != torch.float32:
            # Here float32 itself would be off by more than is accepted.
            yield case(dtype, Layer(16, 4), ((20, 150), (33, 33)), values="spread scores")
        # Several tiles of rows, and a long context.
        yield case(dtype, Layer(2, 2, 32), ((150, 150), (131, 140)))
        yield case(dtype, Layer(4, 2, 64, 64), ((3, 8193),))
        yield case(dtype, Layer(2, 1, 32, 1, window=1000), ((2, 8193),))


def case(dtype: torch.dtype, layer: Layer, batch: Batch, *, num_padding_rows: int = 0, **options: Any) -> Case:
    """A call with random values; `options` are those of `paged_inputs`."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        rows = [num_rows for num_rows, _ in batch]
        num_keys = [length for _, length in batch]
        made = paged_inputs(generator, layer, dtype, sum(rows) + num_padding_rows, num_keys, **options)
        cu_rows = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pool = (made.k_KPSH, made.v_KPSH)
        where = (made.page_table_BP, cu_rows, made.num_keys_B)
        how = (layer.scale, layer.window, layer.soft_cap)
        return made.q_TNH, *pool, *where, made.sinks_N, made.out_TNH, *how

    added = {"padding": num_padding_rows, **options}
    notes = "".join(f", {name} {value}" for name, value in added.items() if value)
    return Case(f"{dtype} {layer} {batch}{notes}", layer.signature(dtype), make)


def _timed(tokens: int) -> Case:
    return case(torch.bfloat16, Layer(32, 8, 128, 16), ((tokens, tokens),))


def _flops(q: torch.Tensor, *rest: Any) -> int:
    """Two products over the keys that each row of one whole prompt sees."""
    tokens, heads, head_dim = q.shape
    return 4 * heads * head_dim * (tokens * (tokens + 1) // 2)


CONTRACT = Contract(
    name="attention_extend",
    summary="causal attention of new tokens over the keys and values in their sequence's pages",
    arguments=(
        Argument("q", ("token", "head", "head_dim"), note="rows of each sequence together, then padding"),
        Argument(
            "k_pool",
            ("kv_head", "page", "slot", "head_dim"),
            note="any strides but the last; finite where keys are",
        ),
        Argument(
            "v_pool",
            ("kv_head", "page", "slot", "head_dim"),
            note="any strides but the last; finite where keys are",
        ),
        Argument("page_table", ("sequence", "page"), note="int32; not followed after a sequence's last key"),
        Argument("cu_rows", ("sequence + 1",), note="int32; the first row of each sequence, then of padding"),
        Argument("num_keys", ("sequence",), note="int32; new tokens included; 0 gives zeros"),
        Argument("sinks", ("head",), note="a logit of each head without a value, or None"),
        Argument("out", ("token", "head", "head_dim"), written=True, note="padding becomes zeros"),
        Argument("scale", note="above 0"),
        Argument("window", note="keys a token sees, its own included; 0 for all"),
        Argument("soft_cap", note="cap * tanh(score / cap); 0 for none"),
    ),
    returns=(),
    rounding="float32 scores and sums; weights may be rounded to the pool's dtype; one rounding to the dtype of out",
    signature=(
        "dtype",
        "pool_dtype",
        "page_size",
        "head_dim",
        "heads",
        "kv_heads",
        "window",
        "soft_cap",
        "sinks",
    ),
    reference=attention_extend,
    cases=_cases,
    # A score sums H products of size 1.2 / sqrt(H): its error walks sqrt(H / 2) units of partial sums that end near
    # 1.2, below 3 sqrt(256 / 2) = 34 units for three sigmas. A weight moves by as much, twice so after the division,
    # and values stay below 4. Weights may be rounded to the dtype before the second product, as fused kernels do:
    # each output then moves by a rounding of sum(weight * |value|), below 4.
    tolerance=rounded(1, maths=4, absolute=2 * 34 * 4 * FLOAT32_UNIT, inside=4.0),
    mutants=MUTANTS,
    workload=Workload(
        "tokens of one prompt, 32 heads over 8 of 128, bfloat16",
        (128, 512, 2048, 4096),
        _timed,
        num_flops=_flops,
    ),
)
