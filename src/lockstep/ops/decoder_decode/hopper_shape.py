"""How a decoder is shared out over the thread blocks of a Hopper."""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

ROW_COUNTS = (1, 2, 4, 8)
"""Rows that a kernel is compiled for. Fewer leave some of them without keys."""

LAYER_BYTES = 9 * 8
"""Addresses of a block's weights."""

_UNIT = 8
_WARPS = 8
_CHUNK = 1024
_STAGE_BYTES = 17 * 1024
_HEAD_PADDING, _INPUT_PADDING = 4, 32
_MOST_SHARED = 225 * 1024
"""A thread block can have 227 KB; the kernel declares some by itself."""
_MOST_STAGES = 12
_FEWEST_STAGES = 6
_MOST_SPLITS = 16
_H100 = 132
"""Multiprocessors."""


class DecoderShape(NamedTuple):
    """Sizes of a decoder of `layers` blocks, `group` query heads for each KV head, pages of `page_size` slots; whether
    heads have norms and their product a bias."""

    hidden: int
    inner: int
    kv_heads: int
    group: int
    head_dim: int
    layers: int
    page_size: int
    norms: bool
    bias: bool

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.kv_heads * self.group * self.head_dim

    @property
    def qkv(self) -> int:
        """Width of query, key and value heads."""
        return self.query + 2 * self.kv_heads * self.head_dim


class DecodeGrid(NamedTuple):
    """A kernel for up to `rows` rows: thread blocks, those that share the keys of a KV head, stages of each ring,
    stages of a product that leave it early, bytes of shared memory, and words through which thread blocks talk."""

    rows: int
    blocks: int
    splits: int
    stages: int
    held: int
    shared_bytes: int
    words: int


def why_not(shape: DecoderShape) -> str | None:
    """The reason why the kernel cannot serve a decoder of this shape; None when it can."""
    widths = {"hidden": shape.hidden, "inner": shape.inner, "query": shape.query}
    for name, width in widths.items():
        if width % 256:
            return f"multiplies widths that are multiples of 256, not a {name} size of {width}"
    if shape.head_dim not in (64, 128) or shape.group > 8:
        return f"serves heads of 64 or 128, up to 8 for a KV head, not {shape.group} of {shape.head_dim}"
    if shape.page_size % 16:
        return f"reads 16 keys at a time, which pages of {shape.page_size} are no multiple of"
    if grid_of(shape, 1, _H100) is None:
        return "finds no room for such widths beside the weights that are on their way"
    return None


def grid_of(shape: DecoderShape, num_rows: int, multiprocessors: int) -> DecodeGrid | None:
    """The kernel for so many rows of a decoder that it can serve, on a device of so many multiprocessors; None where
    it has no room."""
    rows = next((count for count in ROW_COUNTS if num_rows <= count), None)
    if rows is None:
        return None
    blocks = _blocks(shape, multiprocessors)
    pairs = shape.group * shape.head_dim // 2
    most = min(_MOST_SPLITS, blocks // (rows * shape.kv_heads))
    splits = max((count for count in (1, 2, 4, 8, 16) if count <= most and pairs % count == 0), default=0)
    rest = _rest_bytes(shape, rows, blocks)
    stages = min(_MOST_STAGES, (_MOST_SHARED - rest) // _STAGE_BYTES)
    if splits == 0 or stages < _FEWEST_STAGES:
        return None
    parts = rows * shape.kv_heads * splits * (2 * pairs + 2 * shape.group)
    words = rows * (shape.qkv + shape.query + 2 * shape.hidden + shape.inner) // 2 + parts
    # What is held early must not push the residual stream out of the registers.
    numbers = rows * shape.hidden
    held = 3 if numbers <= 1024 else 2 if numbers <= 4096 else 1
    return DecodeGrid(rows, blocks, splits, stages, held, rest + stages * _STAGE_BYTES, words)


def most_rows(hidden: int) -> int:
    """Rows of a step up to which the kernel is known to be faster than one kernel after the other.

    On one NVIDIA H100 80GB it was with rows of 1,024 numbers, up to 4 of them, and not with one row of 4,096.
    """
    return 4 if hidden <= 1024 else 0


def rows_served(shape: DecoderShape, multiprocessors: int) -> int:
    """Those of `most_rows` that find room on a device of so many multiprocessors."""
    counts = range(1, most_rows(shape.hidden) + 1)
    return len(list(takewhile(lambda count: grid_of(shape, count, multiprocessors) is not None, counts)))


def _blocks(shape: DecoderShape, multiprocessors: int) -> int:
    """As few as share out all products best; each has a share of every one."""
    products = (
        (shape.qkv, shape.hidden),
        (shape.hidden, shape.query),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    )
    most = min(multiprocessors, *(width // _UNIT for width in (shape.hidden, shape.inner, shape.qkv)))

    def largest_share(blocks: int) -> int:
        return sum(_share(outputs, blocks) * inputs for outputs, inputs in products)

    return min(range(1, most + 1), key=lambda blocks: (largest_share(blocks), blocks))


def _share(outputs: int, blocks: int) -> int:
    """The most units of a product that a thread block has."""
    return -(-(outputs // _UNIT) // blocks)


def _rest_bytes(shape: DecoderShape, rows: int, blocks: int) -> int:
    """Shared memory beside the ring."""
    units = max(_share(shape.qkv, blocks), 2 * _share(shape.inner, blocks), _share(shape.hidden, blocks))
    sums = _WARPS * units * rows * _UNIT * 4
    results = _WARPS * shape.group * (shape.head_dim + _HEAD_PADDING) * 4
    inputs = rows * (max(shape.hidden, shape.inner, shape.query) + _INPUT_PADDING) * 2
    fresh = (shape.group + 2) * shape.head_dim * 2
    return sums + results + inputs + fresh + shape.layers * LAYER_BYTES
