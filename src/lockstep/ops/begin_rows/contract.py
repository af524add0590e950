"""Contract of begin_rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lockstep.ops.begin_rows.reference import begin_rows
from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload

_Tensor = torch.Tensor
_Optional = _Tensor | None
_Arguments = tuple[_Tensor, _Optional, _Optional, _Tensor, _Tensor, _Tensor]
_Results = tuple[_Tensor, _Tensor]

_SHAPES = ((1, 64, 8), (1, 1024, 64), (5, 576, 32), (40, 96, 16), (300, 33, 3), (2, 5120, 64), (0, 64, 8))
"""Rows, model, rotated pairs."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            yield _case(shape, dtype)
        yield _case(_SHAPES[2], dtype, all_known=True)
        yield _case(_SHAPES[2], dtype, rows_apart=True)
        # The large ones are beyond float16's range in part: infinities are copied as well.
        for size in (0.0, 3e4):
            yield _case(_SHAPES[2], dtype, size=size)


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    all_known: bool = False,
    rows_apart: bool = False,
    size: float = 1.0,
    vocab_size: int = 97,
) -> Case:
    rows, width, pairs = shape

    def make(g: torch.Generator) -> _Arguments:
        """Of rows whose token the host knows, the source is the first entry, which is 0; the others' tokens are 0."""
        table = normal(g, vocab_size, width, dtype=dtype, scale=size)
        cos_sin = normal(g, 2, 50, pairs, dtype=torch.float32)
        token_ids = torch.randint(vocab_size, (rows,), generator=g)
        positions = torch.randint(50, (rows,), generator=g)
        table = strided(table) if rows_apart else table
        if all_known:
            return token_ids, None, None, positions, table, cos_sin
        num_sequences = max(rows, 1) + 3
        last_tokens = torch.randint(vocab_size, (num_sequences,), generator=g)
        last_tokens[0] = 0
        sources = torch.randperm(num_sequences - 1, generator=g)[:rows] + 1
        is_known = torch.rand(rows, generator=g) < 0.4
        sources[is_known], token_ids[~is_known] = 0, 0
        return token_ids, sources, last_tokens, positions, table, cos_sin

    what = (
        ", no sources" * all_known + ", rows of the table apart" * rows_apart + f", size {size:g}" * (size != 1)
    )
    signature = {"dtype": dtype, "width": width, "pairs": pairs}
    return Case(f"{dtype} {rows}x{width}, {pairs} pairs{what}", signature, make)


def _sources_ignored(
    token_ids: _Tensor, sources: _Optional, last_tokens: _Optional, *looked_up: Any
) -> _Results:
    return begin_rows(token_ids, None, None, *looked_up)


def _sources_by_row(
    token_ids: _Tensor, sources: _Optional, last_tokens: _Optional, *looked_up: Any
) -> _Results:
    own = None if sources is None else torch.where(sources != 0, torch.arange(len(sources)), 0)
    return begin_rows(token_ids, own, last_tokens, *looked_up)


def _known_tokens_ignored(token_ids: _Tensor, *given: Any) -> _Results:
    return begin_rows(torch.zeros_like(token_ids), *given)


def _next_position(*given: Any) -> _Results:
    *tokens, positions, table, cos_sin = given
    changed = (*tokens, (positions + 1) % cos_sin.shape[1], table, cos_sin)
    return begin_rows(*changed)


def _cos_for_sin(*given: Any) -> _Results:
    *others, cos_sin = given
    changed = (*others, cos_sin.flip(0))
    return begin_rows(*changed)


def _last_column_left(*given: Any) -> _Results:
    hidden, angles = begin_rows(*given)
    hidden[:, -1], angles[..., -1] = 0, 0
    return hidden, angles


def _timed(rows: int) -> Case:
    return _case((rows, 1024, 64), torch.bfloat16, vocab_size=4096)


def _moved(
    token_ids: _Tensor, sources: _Optional, last_tokens: _Optional, positions: _Tensor, *tables: _Tensor
) -> int:
    """What is looked up is read and written; of what it is looked up in the rest stays where it is."""
    rows_VD, cos_sin = tables
    numbers = 8 * (2 if sources is None else 4)
    looked_up = rows_VD.shape[1] * rows_VD.itemsize + 2 * cos_sin.shape[2] * cos_sin.itemsize
    return len(token_ids) * (numbers + 2 * looked_up)


CONTRACT = Contract(
    name="begin_rows",
    summary="embeddings and rotation angles of rows, whose tokens the step before may have chosen",
    arguments=(
        Argument("token_ids", ("row",), note="int64"),
        Argument(
            "sources", ("row",), note="int64, or None; the entry of last_tokens that is added to the token"
        ),
        Argument("last_tokens", ("sequence",), note="int64, or None"),
        Argument("positions", ("row",), note="int64"),
        Argument("table", ("vocab", "hidden")),
        Argument("cos_sin", ("two", "position", "pair"), note="float32: cosines, then sines"),
    ),
    returns=("hidden[row, hidden]", "angles[two, row, pair]"),
    rounding="none",
    signature=("dtype", "width", "pairs"),
    reference=begin_rows,
    cases=_cases,
    tolerance=dict.fromkeys(DTYPES, Tolerance(0, 0)),
    mutants={
        "sources ignored": _sources_ignored,
        "sources by row": _sources_by_row,
        "known tokens ignored": _known_tokens_ignored,
        "angles of the next position": _next_position,
        "sine in the place of cosine": _cos_for_sin,
        "last column left out": _last_column_left,
    },
    workload=Workload("rows of 1024 bfloat16", (1, 16, 256, 2048, 8192), _timed, num_bytes=_moved),
)
