"""Contract of copy_words."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lockstep.ops.contract import Argument, Case, Contract, Tolerance, Workload
from lockstep.ops.copy_words.reference import copy_words

_Arguments = tuple[torch.Tensor, torch.Tensor]

_SHAPES = ((1, 1), (1, 40), (2, 256), (5, 3), (1, 70001), (7, 1000), (0, 4), (3, 0))
_BETWEEN = 24
"""Words between the rows of a table that is wider than what is copied."""


def _cases() -> Iterator[Case]:
    for shape in _SHAPES:
        for apart in ("", "source", "target"):
            yield _case(shape, apart)


def _case(shape: tuple[int, int], apart: str) -> Case:
    def make(g: torch.Generator) -> _Arguments:
        source, target = (_words(g, shape, _BETWEEN * (name == apart)) for name in ("source", "target"))
        return source, target

    rows, words = shape
    where = f", rows of the {apart} apart" if apart else ""
    return Case(f"{rows}x{words}{where}", {"dtype": torch.int32}, make)


def _words(g: torch.Generator, shape: tuple[int, int], between: int) -> torch.Tensor:
    rows, words = shape
    wide = torch.randint(-(2**31), 2**31, (rows, words + between), generator=g)
    return wide.int()[:, :words]


def _without_the_last_word(source: torch.Tensor, target: torch.Tensor) -> None:
    copy_words(source[:, :-1], target[:, :-1])


def _without_the_last_row(source: torch.Tensor, target: torch.Tensor) -> None:
    copy_words(source[:-1], target[:-1])


def _rows_swapped(source: torch.Tensor, target: torch.Tensor) -> None:
    copy_words(source.flip(0), target)


def _target_taken_as_packed(source: torch.Tensor, target: torch.Tensor) -> None:
    copy_words(source, target.as_strided(source.shape, (source.shape[1], 1)))


def _the_other_way(source: torch.Tensor, target: torch.Tensor) -> None:
    copy_words(target, source)


def _timed(words: int) -> Case:
    return _case((1, words), "")


CONTRACT = Contract(
    name="copy_words",
    summary="copy words of 32 bits between memory of the device and pinned memory of the host",
    arguments=(
        Argument("source", ("row", "word"), note="int32, words side by side; of the device, or pinned"),
        Argument("target", ("row", "word"), written=True, note="the same; nothing of it lies in the source"),
    ),
    returns=(),
    rounding="none",
    signature=("dtype",),
    reference=copy_words,
    cases=_cases,
    tolerance={torch.int32: Tolerance(0, 0)},
    mutants={
        "without the last word": _without_the_last_word,
        "without the last row": _without_the_last_row,
        "rows swapped": _rows_swapped,
        "target taken as packed": _target_taken_as_packed,
        "the other way": _the_other_way,
    },
    workload=Workload(
        "words", (32, 256, 1024, 32768), _timed, num_bytes=lambda source, target: source.nbytes + target.nbytes
    ),
)
