"""Spans as arrays: the same sequence of spans, sliced and read like a list of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lockstep.attention.backend import Span
from lockstep.attention.paged_backend import FixedTables, PageTables
from lockstep.attention.spans import PlainMemory, Spans

pytestmark = pytest.mark.suite("cpu")

PAGE_SIZE = 4


def random_spans(seed: int) -> list[Span]:
    print(f"seed {seed}")
    chooser, spans = random.Random(seed), []
    for _ in range(chooser.randint(0, 7)):
        start, count = chooser.randint(0, 50), chooser.choice([1, 1, 1, 6])
        spans.append(
            Span(start, count, [chooser.randrange(99) for _ in range(-(-(start + count) // PAGE_SIZE))])
        )
    return spans


@pytest.mark.parametrize("seed", range(12))
def test_arrays_hold_the_same_spans(seed: int) -> None:
    spans = random_spans(seed)
    batch = Spans.of(spans, PAGE_SIZE)
    assert list(batch) == spans and len(batch) == len(spans) and Spans.of(batch, PAGE_SIZE) is batch
    assert batch.most_pages == max((len(span.page_ids) for span in spans), default=0)
    singles = [span.num_tokens == 1 for span in spans]
    assert batch.num_leading_single == (singles.index(False) if False in singles else len(spans))
    for cut in range(len(spans) + 1):
        assert list(batch[:cut]) == spans[:cut] and list(batch[cut:]) == spans[cut:]


@pytest.mark.parametrize("seed", range(12))
def test_page_tables_are_written_as_told(seed: int) -> None:
    """Against the tables' definition, one sequence at a time."""
    spans = random_spans(seed)
    tables, row = PageTables.of(Spans.of(spans, PAGE_SIZE), torch.device("cpu")), 0
    assert len(tables.num_keys_B) == len(spans) and len(tables.cu_rows_B1) == len(spans) + 1
    for index, span in enumerate(spans):
        assert tables.num_keys_B[index] == span.num_kv_tokens
        assert tables.page_table_BP[index, : len(span.page_ids)].tolist() == list(span.page_ids)
        assert tables.cu_rows_B1[index] == row
        row += span.num_tokens
    assert tables.cu_rows_B1[-1] == row


@pytest.mark.parametrize("seed", range(6))
def test_fixed_tables_hold_what_was_written_last(seed: int) -> None:
    """Pages go from one to another: each write leaves every sequence's own ones, and copies only if it must."""
    print(f"seed {seed}")
    chooser, copied = random.Random(seed), list[int]()
    tables = FixedTables(torch.zeros(8, dtype=torch.int32), 14, PAGE_SIZE)

    class Counting(PlainMemory):
        def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
            copied.append(array.size)
            super().fill(target, array)

    def write(lengths: list[int], pages_BP: np.ndarray) -> None:
        start_B = np.array(lengths, dtype=np.int64) - 1
        tables.write(Spans(start_B, np.ones_like(start_B), pages_BP, PAGE_SIZE, Counting()))
        for row, length in enumerate(lengths):
            own = -(-length // PAGE_SIZE)
            assert tables.page_table_BP[row, :own].tolist() == pages_BP[row, :own].tolist()

    for _ in range(40):
        lengths = [chooser.randint(1, 50) for _ in range(chooser.randint(1, 8))]
        pages_BP = np.array([[chooser.randrange(9) for _ in range(14)] for _ in lengths], dtype=np.int32)
        write(lengths, pages_BP)
        num_copies = len(copied)
        write(lengths, pages_BP.copy())
        assert len(copied) == num_copies, "nothing changed"
        row = chooser.randrange(len(lengths))
        pages_BP[row, (lengths[row] - 1) // PAGE_SIZE] += 1
        write(lengths, pages_BP)
        assert len(copied) == num_copies + 1


def test_pages_beyond_those_that_are_asked_for_are_not_read() -> None:
    rows_BP = np.array([[5, 6, 7], [8, 9, 1]], dtype=np.int32)
    batch = Spans(np.array([3, 4]), np.array([1, 1]), rows_BP, PAGE_SIZE)
    assert [span.page_ids for span in batch] == [[5], [8, 9]]
    assert batch.page_table(5).tolist() == [[5, 6, 7, 0, 0], [8, 9, 1, 0, 0]]
    assert batch.page_table(2).tolist() == [[5, 6], [8, 9]]
