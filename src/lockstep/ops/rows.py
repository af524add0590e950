"""Tensors of any shape as rows of memory, and how many of them a program of a GPU kernel takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lockstep.ops.contract import Signature

WIDEST_ROW = 65536
"""Elements that one program can hold in registers: 1024 threads with 64 each."""

_MOST_ELEMENTS = 4096
_PROGRAMS = 1024  # several for each processor of a large GPU


class Rows(NamedTuple):
    """Row i starts `i // inner * outer_stride + i % inner * inner_stride` elements after the first of `values`.

    `values` is the tensor that was given, or a packed copy where two strides cannot describe its rows.
    """

    values: torch.Tensor
    num: int
    width: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """What a program needs to find an element."""
        return self.inner, self.outer_stride, self.inner_stride, self.column_stride


def as_rows(values: torch.Tensor) -> Rows:
    """The vectors along the last dim, whatever the dims before it."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True):
        # Strides of an empty tensor lead nowhere: any two of its dims are as good as one.
        if merged and (merged[-1][1] == size * stride or values.numel() == 0):
            merged[-1] = (merged[-1][0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    if len(merged) > 2:
        return as_rows(values.contiguous())
    (outer, outer_stride), (inner, inner_stride) = [*merged, (1, 0), (1, 0)][:2]
    return Rows(values, outer * inner, values.shape[-1], inner, outer_stride, inner_stride, values.stride(-1))


class Tile(NamedTuple):
    """The part of one program: `rows` rows by `block` columns, a power of two each."""

    rows: int
    block: int
    num_warps: int


def whole_row_tile(num_rows: int, width: int) -> Tile:
    """For programs that hold whole rows in registers: one row, or several narrow ones where rows are plenty.

    A thread reads 16 bytes of a 16-bit dtype at a time; with many rows it reads twice as much, which keeps more
    bytes on their way, and with few it stops at one read, which spreads a row over more threads.
    """
    block = power_of_two(width)
    rows = min(max(_MOST_ELEMENTS // block, 1), power_of_two(num_rows // _PROGRAMS))
    per_thread = 16 if num_rows >= _PROGRAMS else 8
    return Tile(rows, block, min(max(rows * block // (32 * per_thread), 1), 32))


def elementwise_tile(num_rows: int, width: int) -> Tile:
    """For programs that treat every element alone: up to 2048 elements, fewer where programs would be too few."""
    share = power_of_two(num_rows * width // _PROGRAMS)
    elements = min(max(share, 256), 2048)
    block = min(power_of_two(width), elements)
    rows = min(elements // block, power_of_two(num_rows))
    per_thread = 16 if elements == 2048 else 8
    return Tile(rows, block, min(max(rows * block // (32 * per_thread), 1), 4))


def refuses_wide_rows(signature: Signature) -> str | None:
    """The predicate of kernels that hold whole rows."""
    width = signature["width"]
    return None if width <= WIDEST_ROW else f"holds a row in registers: up to {WIDEST_ROW} wide, not {width}"


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
