"""Contract of choose_greedy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.cases import DTYPES, normal, strided
from lockstep.ops.choose_greedy.reference import choose_greedy
from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_SHAPES = ((1, 1, 0), (5, 64, 1), (24, 1001, 8), (0, 64, 0), (300, 33, 44), (2, 40007, 0), (3, 20000, 3))
"""Rows, vocabulary, rows of nobody."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            yield _case(shape, dtype)
        yield _case((24, 1001, 3), dtype, many_equal=True)
        yield _case((3, 1001, 1), dtype, size=0.0)
        yield _case((3, 1001, 1), dtype, size=3e4)
        yield _case((6, 20000, 1), dtype, infinite=True)


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    many_equal: bool = False,
    infinite: bool = False,
    size: float = 4.0,
) -> Case:
    rows, vocab_size, num_nobodys = shape

    def make(g: torch.Generator) -> _Arguments:
        logits = normal(g, rows, vocab_size, dtype=dtype, scale=size)
        if many_equal:
            logits = strided(-logits.abs().round())
        if infinite:
            logits[1], logits[2] = -torch.inf, -torch.inf
            logits[1, 12345], logits[3, 19999] = torch.finfo(dtype).min, torch.inf
        num_sequences = rows + 5
        owners = torch.randperm(num_sequences - 1, generator=g)[:rows] + 1
        owners[torch.randperm(rows, generator=g)[:num_nobodys]] = 0
        last_tokens = torch.randint(vocab_size, 2 * vocab_size, (num_sequences,), generator=g)
        return logits, owners, last_tokens

    what = (
        ", many equal, negative and zero" * many_equal
        + ", infinite" * infinite
        + f", size {size:g}" * (size != 4)
    )
    signature = {"dtype": dtype, "vocab_size": vocab_size}
    return Case(f"{dtype} {rows}x{vocab_size}, {num_nobodys} of nobody{what}", signature, make)


def _last_of_equals(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    flipped = torch.empty_like(last_tokens)
    places, values = choose_greedy(logits.flip(-1), owners, flipped)
    token_ids = logits.shape[-1] - 1 - places
    _keep(token_ids, owners, last_tokens)
    return torch.stack((token_ids, values))


def _nothing_kept(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    return choose_greedy(logits, owners, last_tokens.clone())


def _kept_by_row(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    return choose_greedy(logits, torch.arange(1, len(owners) + 1), last_tokens)


def _nobodys_kept(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    packed = choose_greedy(logits, owners, last_tokens)
    last_tokens[owners] = packed[0].long()
    return packed


def _kept_of_the_next_row(
    logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor
) -> torch.Tensor:
    packed = choose_greedy(logits, owners, last_tokens)
    _keep(packed[0].roll(-1), owners, last_tokens)
    return packed


def _without_the_last_column(
    logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor
) -> torch.Tensor:
    return choose_greedy(logits[:, : max(logits.shape[-1] - 1, 1)], owners, last_tokens)


def _values_first(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    return choose_greedy(logits, owners, last_tokens).flip(0)


def _values_in_the_dtype(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    places, values = choose_greedy(logits, owners, last_tokens)
    return torch.stack((places, values.view(torch.float32).bfloat16().float().half().float().view(torch.int32)))


def _keep(token_ids: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> None:
    is_owned = owners != 0
    last_tokens[owners[is_owned]] = token_ids[is_owned].long()


def _timed(rows: int) -> Case:
    return _case((rows, 151936, 0), torch.bfloat16)


def _moved(logits: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> int:
    """A row names one entry of the tokens that are kept, and gets two words."""
    return logits.nbytes + owners.nbytes + len(owners) * (8 + 8)


CONTRACT = Contract(
    name="choose_greedy",
    summary="the best token of each row, kept for the next step and packed for the host",
    arguments=(
        Argument("logits", ("row", "vocab"), note="the first of equal values wins; NaN is above all"),
        Argument(
            "owners", ("row",), note="int64, all different; 0 for rows of nobody, whose tokens are not kept"
        ),
        Argument("last_tokens", ("sequence",), written=True, note="int64"),
    ),
    returns=("packed[2, row]",),
    rounding="values to float32",
    signature=("dtype", "vocab_size"),
    reference=choose_greedy,
    cases=_cases,
    tolerance=dict.fromkeys((torch.int32, torch.int64), Tolerance(0, 0)),
    mutants={
        "last of equals": _last_of_equals,
        "nothing kept": _nothing_kept,
        "kept by row": _kept_by_row,
        "tokens of nobody kept": _nobodys_kept,
        "kept of the next row": _kept_of_the_next_row,
        "without the last column": _without_the_last_column,
        "values first": _values_first,
        "values rounded": _values_in_the_dtype,
    },
    workload=Workload("rows of 151936 bfloat16 logits", (1, 16, 64, 256), _timed, num_bytes=_moved),
    parts=("argmax",),
)
