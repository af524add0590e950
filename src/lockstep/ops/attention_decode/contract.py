"""Contract of attention_decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lockstep.ops.attention_decode.reference import attention_decode
from lockstep.ops.attention_extend.cases import LAYERS, Layer, in_turn, paged_inputs
from lockstep.ops.attention_extend.contract import CONTRACT as EXTEND
from lockstep.ops.attention_extend.mutants import MUTANTS
from lockstep.ops.cases import DTYPES
from lockstep.ops.contract import Argument, Case, Contract, Workload

# Keys of each sequence; one without keys is padding.
_BATCHES = ((37,), (16, 17, 1), (65, 0, 64), (130, 5), (0, 200, 33, 7))


def _cases() -> Iterator[Case]:
    for number, dtype in enumerate(DTYPES):
        for layer, num_keys in zip(LAYERS, in_turn(number, _BATCHES), strict=False):
            yield case(dtype, layer, num_keys)
        plain = Layer(4, 2)
        yield case(dtype, plain, ())
        yield case(dtype, plain, (0,))
        yield case(dtype, plain, (1,))
        yield case(dtype, plain, (20, 3), num_spare_pages=2)
        yield case(dtype, plain, (20, 3), slice_rows=True)
        yield case(dtype, plain, (20, 33), pages_first=True)
        yield case(dtype, Layer(4, 2, 64, 16), (20, 1, 65, 33), unseen="NaN")
        yield case(dtype, Layer(4, 2, 64, 16, window=7), (20, 1, 65), unseen="NaN")
        yield case(dtype, Layer(128, 128, 32), (18,))
        yield case(dtype, Layer(128, 1, 32), (18, 2))
        yield case(dtype, Layer(4, 2, 64, 64), (8193,))
        yield case(dtype, Layer(4, 2, 64, 16, sinks=True), (1025, 3))
        yield case(dtype, Layer(2, 1, 32, 1, window=1000), (8193, 999))
        yield case(dtype, plain, (20, 3), values="zero queries")
        yield case(dtype, plain, (20, 3), values="large queries")
        if dtype != torch.float32:
            # Here float32 itself would be off by more than is accepted.
            yield case(dtype, Layer(64, 8), (150, 97, 150, 40), values="spread scores")
        # Enough sequences that none needs splitting.
        yield case(dtype, Layer(64, 64, 16), (3, 0, 17, 9, 1, 2, 30, 5, 4, 0, 6, 40, 8, 7, 21, 1))


def case(dtype: torch.dtype, layer: Layer, num_keys: Any, **options: Any) -> Case:
    """A call with random values for sequences of so many keys; `options` are those of `paged_inputs`."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        made = paged_inputs(generator, layer, dtype, len(num_keys), num_keys, **options)
        pool = (made.k_KPSH, made.v_KPSH)
        how = (layer.scale, layer.window, layer.soft_cap)
        return made.q_TNH, *pool, made.page_table_BP, made.num_keys_B, made.sinks_N, made.out_TNH, *how

    notes = "".join(f", {name} {value}" for name, value in options.items())
    return Case(f"{dtype} {layer} {num_keys}{notes}", layer.signature(dtype), make)


def _of_decode(mutant: Callable[..., None]) -> Callable[..., None]:
    """A wrong attention_extend with one row for each sequence."""

    def wrong(*given: Any) -> None:
        mutant(*given[:4], torch.arange(given[0].shape[0] + 1, dtype=torch.int32), *given[4:])

    return wrong


def _arguments() -> Iterator[Argument]:
    for argument in EXTEND.arguments:
        if argument.name == "q":
            yield Argument("q", ("sequence", "head", "head_dim"), note="the last token of each sequence")
        elif argument.name == "out":
            yield replace(argument, axes=("sequence", "head", "head_dim"))
        elif argument.name != "cu_rows":
            yield argument


def _timed(sequences: int) -> Case:
    return case(torch.bfloat16, Layer(32, 8, 128, 16), (2048,) * sequences)


def _moved(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, *rest: Any) -> int:
    """Queries, results, and the keys and values of every sequence; pages that nobody owns stay unread."""
    num_slots = k_pool.shape[1] * k_pool.shape[2]
    return 2 * q.nbytes + (k_pool.nbytes + v_pool.nbytes) * int(rest[1].sum()) // num_slots


CONTRACT = Contract(
    name="attention_decode",
    summary="attention of each sequence's last token over the keys and values in its pages",
    arguments=tuple(_arguments()),
    returns=(),
    rounding=EXTEND.rounding,
    signature=EXTEND.signature,
    reference=attention_decode,
    cases=_cases,
    tolerance=EXTEND.tolerance,
    mutants={name: _of_decode(mutant) for name, mutant in MUTANTS.items()},
    workload=Workload(
        "sequences of 2048 keys, 32 heads over 8 of 128, bfloat16",
        (1, 4, 16, 64, 256),
        _timed,
        num_bytes=_moved,
    ),
)
