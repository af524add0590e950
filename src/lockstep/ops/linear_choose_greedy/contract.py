"""Contract of linear_choose_greedy.

What is compared are scores as they are rounded, so a sum that rounds otherwise may choose another token. All cases are
of whole numbers whose sums are exact in float32, in whatever order: there is one answer, and many scores are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lockstep.ops.cases import DTYPES, strided
from lockstep.ops.choose_greedy.contract import CONTRACT as CHOOSE
from lockstep.ops.contract import Argument, Case, Contract, Workload
from lockstep.ops.linear.reference import linear
from lockstep.ops.linear_choose_greedy.reference import linear_choose_greedy

_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_SHAPES = (
    (1, 64, 96, 0),
    (2, 1024, 40, 1),
    (5, 520, 2000, 1),
    (24, 64, 1000, 8),
    (65, 72, 33, 3),
    (130, 200, 328, 0),
    (0, 64, 64, 0),
    (300, 32, 96, 44),
    (3, 8, 40000, 1),
    (2, 16384, 40, 0),
)
"""Rows, inputs, outputs, rows of nobody."""

_LARGEST = 3
"""Of the whole numbers in rows and weights."""


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in _SHAPES:
            yield _case(shape, dtype)
        yield _case((24, 64, 1000, 3), dtype, is_strided=True)
        yield _case((5, 64, 1000, 1), dtype, size=0)
        yield _case((5, 64, 1000, 1), dtype, size=64)
        yield _case((6, 64, 1000, 1), dtype, is_infinite=True)


def _case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    size: int = 1,
    is_strided: bool = False,
    is_infinite: bool = False,
) -> Case:
    """`size` multiplies the rows. `is_infinite`: a value of two of them is."""
    rows, inputs, outputs, num_nobodys = shape

    def make(g: torch.Generator) -> _Arguments:
        x = _whole(g, rows, inputs, dtype) * size
        weight = _whole(g, outputs, inputs, dtype)
        if is_infinite:
            weight[:, 0] = 1
            weight[outputs // 2 :, 0] = 2
            x[1, 0], x[2, 0] = torch.inf, -torch.inf
        num_sequences = rows + 5
        owners = torch.randperm(num_sequences - 1, generator=g)[:rows] + 1
        owners[torch.randperm(rows, generator=g)[:num_nobodys]] = 0
        last_tokens = torch.randint(outputs, 2 * outputs, (num_sequences,), generator=g)
        return strided(x) if is_strided else x, weight, owners, last_tokens

    words = f"{' strided' * is_strided}{' infinite' * is_infinite}{f' size {size}' * (size != 1)}"
    signature = {"dtype": dtype, "inputs": inputs, "outputs": outputs}
    return Case(f"{dtype} {rows}x{inputs}x{outputs}, {num_nobodys} of nobody{words}", signature, make)


def _whole(g: torch.Generator, rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-_LARGEST, _LARGEST + 1, (rows, inputs), generator=g).to(dtype)


def _one_input_short(x: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
    return linear_choose_greedy(x[:, :-1], weight[:, :-1], *kept)


def _without_the_last_output(x: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
    return linear_choose_greedy(x, weight[: max(len(weight) - 1, 1)], *kept)


def _scores_not_rounded(x: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
    return linear_choose_greedy(x.double(), weight.double(), *kept)


def _chosen_by(wrong: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def chosen(x: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        return wrong(linear(x, weight), *kept)

    return chosen


def _timed(rows: int) -> Case:
    return _case((rows, 1024, 151936, 0), torch.bfloat16)


def _moved(x: torch.Tensor, weight: torch.Tensor, owners: torch.Tensor, last_tokens: torch.Tensor) -> int:
    """A row names one entry of the tokens that are kept, and gets two words."""
    return x.nbytes + weight.nbytes + owners.nbytes + len(owners) * (8 + 8)


def _flops(x: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> int:
    return 2 * len(x) * weight.numel()


CONTRACT = Contract(
    name="linear_choose_greedy",
    summary="the best of x @ weight^T for each row, kept for the next step and packed for the host",
    arguments=(
        Argument("x", ("row", "input")),
        Argument("weight", ("output", "input"), constant=True),
        *(argument for argument in CHOOSE.arguments if argument.name != "logits"),
    ),
    returns=CHOOSE.returns,
    rounding="sums in float32 or wider, one rounding to the dtype of x before they are compared",
    signature=("dtype", "inputs", "outputs"),
    reference=linear_choose_greedy,
    cases=_cases,
    tolerance=CHOOSE.tolerance,
    mutants={
        "one input short": _one_input_short,
        "without the last output": _without_the_last_output,
        "scores not rounded": _scores_not_rounded,
        **{name: _chosen_by(mutant) for name, mutant in CHOOSE.mutants.items()},
    },
    workload=Workload(
        "rows times a 151936 x 1024 weight, bfloat16",
        (1, 16, 64, 256),
        _timed,
        num_bytes=_moved,
        num_flops=_flops,
    ),
    parts=("linear", "choose_greedy", "argmax"),
)
