"""Tensors as rows, and tiles of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.ops.rows import WIDEST_ROW, as_rows, elementwise_tile, power_of_two, whole_row_tile

pytestmark = pytest.mark.suite("cpu")


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of one to four dims, permuted and cut, whose elements all differ."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    view = whole.permute(draw(st.permutations(range(len(shape)))))
    cuts = [draw(st.slices(size)) for size in view.shape]
    # Steps go forward, and no further than the longest dim: a huge one overflows the strides of the view itself.
    forward = [slice(cut.start, cut.stop, min(max(cut.step or 1, 1), 5)) for cut in cuts]
    return view[tuple(forward)]


@settings(deadline=None, max_examples=400)
@given(views())
def test_every_element_is_found_where_the_strides_say(tensor: torch.Tensor) -> None:
    rows = as_rows(tensor)
    packed = tensor.reshape(rows.num, tensor.shape[-1])
    assert (rows.num, rows.width) == tuple(packed.shape)
    assert rows.values.shape == tensor.shape
    memory = rows.values.untyped_storage()
    flat = torch.tensor([], dtype=tensor.dtype).set_(memory)
    inner, outer_stride, inner_stride, column_stride = rows.place
    for row in range(rows.num):
        start = rows.values.storage_offset() + row // inner * outer_stride + row % inner * inner_stride
        for column in range(rows.width):
            assert flat[start + column * column_stride] == packed[row, column]


def test_slices_of_packed_heads_are_not_copied() -> None:
    packed = torch.empty(5, 7, 64)
    for view in (packed, packed[:, 2:5], packed[..., :32], packed[:, 3], packed[0, 0], packed.unsqueeze(0)):
        assert as_rows(view).values.data_ptr() == view.data_ptr()


@given(st.integers(0, 1 << 22), st.integers(1, WIDEST_ROW))
def test_tiles_cover_what_they_must(num_rows: int, width: int) -> None:
    for tile in (whole_row_tile(num_rows, width), elementwise_tile(num_rows, width)):
        assert all(number == power_of_two(number) and number >= 1 for number in tile)
        assert tile.num_warps <= 32
        assert tile.rows * tile.block <= max(4096, power_of_two(width))
    assert whole_row_tile(num_rows, width).block >= width
    # 2^31 - 1 programs are the limit of a launch.
    tile = elementwise_tile(num_rows, width)
    assert -(-num_rows // tile.rows) * -(-width // tile.block) < 2**31


def test_few_rows_are_spread_and_many_are_gathered() -> None:
    assert whole_row_tile(1, 4096) == (1, 4096, 16)
    assert whole_row_tile(16384, 4096) == (1, 4096, 8)
    assert whole_row_tile(300_000, 128) == (32, 128, 8)
    assert elementwise_tile(1, 14336) == (1, 256, 1)
    assert elementwise_tile(8192, 14336) == (1, 2048, 4)


def test_powers_of_two() -> None:
    assert [power_of_two(number) for number in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        1024,
        1024,
        2048,
    ]
