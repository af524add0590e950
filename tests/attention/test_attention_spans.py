"""Spans as arrays: the same sequence of spans, sliced and read like a list of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lockstep.attention.backend import Span
from lockstep.attention.paged_backend import PageTables
from lockstep.attention.spans import Spans

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
    """Against the tables' definition, one sequence at a time; a second write leaves nothing of the first behind."""
    tables = PageTables(8, 14, PAGE_SIZE, torch.device("cpu"))
    for spans in (random_spans(seed + 100), random_spans(seed)):
        tables.write(spans)
        row = 0
        for index in range(8):
            span = spans[index] if index < len(spans) else Span(0, 0, [])
            assert tables.num_keys_B[index] == span.num_kv_tokens
            assert tables.page_table_BP[index, : len(span.page_ids)].tolist() == list(span.page_ids)
            assert tables.cu_rows_B1[index] == row
            row += span.num_tokens
        assert tables.cu_rows_B1[8] == row


def test_pages_beyond_those_that_are_asked_for_are_not_read() -> None:
    rows_BP = np.array([[5, 6, 7], [8, 9, 1]], dtype=np.int32)
    batch = Spans(np.array([3, 4]), np.array([1, 1]), rows_BP, PAGE_SIZE)
    assert [span.page_ids for span in batch] == [[5], [8, 9]]
    assert batch.page_table(5).tolist() == [[5, 6, 7, 0, 0], [8, 9, 1, 0, 0]]
    assert batch.page_table(2).tolist() == [[5, 6], [8, 9]]
