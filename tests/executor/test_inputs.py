"""What a step asks of the rows of its slices."""

from __future__ import annotations

import random

import pytest
import torch

from lockstep.attention.span_backend import SpanBackend
from lockstep.core.request import Pooling
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.executor.inputs import build_inputs, padding_rows
from lockstep.executor.sequences import NOBODY, SequenceTable

pytestmark = pytest.mark.suite("cpu")

PAGE_SIZE = 4


def test_only_rows_that_somebody_sees_are_wanted() -> None:
    """The last row of a slice that samples, every row of a prompt that is scored or pooled, none of the others."""
    plain, scored = SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, prompt_logprobs=0)
    kinds: list[tuple[SamplingParams, Pooling | None, bool]] = [
        (plain, None, True),
        (plain, None, False),
        (scored, None, True),
        (plain, "mean", False),
    ]
    started = tuple(
        SequenceStart(number, params, tuple(range(9)), 9, 0, (), pooling=pooling)
        for number, (params, pooling, _) in enumerate(kinds)
    )
    slices = tuple(
        TokenSlice(number, 0, 6, (2 * number, 2 * number + 1), samples)
        for number, (_, _, samples) in enumerate(kinds)
    )
    plan = StepPlan(0, started, (), slices)
    sequences = SequenceTable(8)
    sequences.apply(plan)
    spans = build_inputs(plan, sequences, PAGE_SIZE).spans
    assert spans.num_wanted_B.tolist() == [1, 0, 6, 6]
    tables = SpanBackend().plan(spans, page_size=PAGE_SIZE, windows=(), device=torch.device("cpu"))
    assert tables.spans.tolist() == [
        [0, 6, 6, 0, 1],
        [6, 6, 6, 2, 0],
        [12, 6, 6, 4, 6],
        [18, 6, 6, 6, 6],
    ]
    assert tables.pages.tolist() == list(range(8))


@pytest.mark.parametrize("longest", [1, 6])
@pytest.mark.parametrize("seed", range(10))
def test_rows_are_what_they_are_one_by_one(seed: int, longest: int) -> None:
    """Single tokens and longer slices, of which the host knows the tokens or not, against their definition."""
    print(f"seed {seed}, slices of up to {longest}")
    chooser = random.Random(f"{seed} {longest}")
    params, starts, slices, pages = SamplingParams(temperature=0.0), [], [], list[list[int]]()
    for seq_id in range(chooser.randint(1, 9)):
        known, at = chooser.randint(1, 20), chooser.randint(0, 20)
        count = min(chooser.randint(1, longest), known - at) if at < known else 1
        pages.append([chooser.randrange(1000) for _ in range(-(-max(known, at + count) // PAGE_SIZE))])
        token_ids = tuple(chooser.randrange(90) for _ in range(known))
        starts.append(SequenceStart(seq_id, params, token_ids, known, 0, tuple(pages[-1])))
        slices.append(TokenSlice(seq_id, at, count, (), at + count >= known))
    sequences, num_rows = SequenceTable(12), sum(piece.num_tokens for piece in slices)
    sequences.apply(StepPlan(0, tuple(starts)))
    chooser.shuffle(slices)
    inputs = build_inputs(StepPlan(1, (), (), tuple(slices)), sequences, PAGE_SIZE, num_rows=num_rows + seed)
    rows, first_rows = list[list[int]](), list[int]()
    for piece in slices:
        slot, start = sequences[piece.seq_id].slot, starts[piece.seq_id]
        first_rows.append(len(rows))
        for at in range(piece.start, piece.start + piece.num_tokens):
            token_id, source = (start.token_ids[at], NOBODY) if at < len(start.token_ids) else (0, slot)
            place = pages[piece.seq_id][at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            rows.append([token_id, at, place, source, slot])
    assert inputs.facts_5T.T.tolist() == rows + [[0, 0, -1, NOBODY, NOBODY]] * seed
    assert inputs.num_keys_T.tolist() == [row[1] + 1 for row in rows] + [0] * seed
    assert inputs.num_rows == num_rows and inputs.first_row_B.tolist() == first_rows
    assert inputs.samples_B.tolist() == [piece.samples for piece in slices]
    for span, piece in zip(inputs.spans, slices, strict=True):
        assert (span.start, span.num_tokens) == (piece.start, piece.num_tokens)
        assert list(span.page_ids) == pages[piece.seq_id][: len(span.page_ids)]
        assert len(span.page_ids) == -(-(piece.start + piece.num_tokens) // PAGE_SIZE)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 17, 33])
def test_one_copy_fills_all_facts_of_the_rows(num_rows: int) -> None:
    """And what kernels read begins where they like it, whatever the number of rows."""
    params, pages = SamplingParams(temperature=0.0), tuple(range(5))
    start = SequenceStart(0, params, tuple(range(17)), 17, 0, pages)
    sequences, plan = SequenceTable(2), StepPlan(0, (start,), (), (TokenSlice(0, 16, 1, (), True),))
    sequences.apply(plan)
    rows, inputs = (
        padding_rows(num_rows, torch.device("cpu")),
        build_inputs(plan, sequences, PAGE_SIZE, num_rows=num_rows),
    )
    assert rows.num_keys_T.tolist() == [0] * num_rows and rows.slots_T.tolist() == [-1] * num_rows
    rows.fill(inputs)
    facts = (rows.token_ids_T, rows.positions_T, rows.slots_T, rows.sources_T, rows.owners_T)
    assert [fact.tolist() for fact in facts] == inputs.facts_5T.tolist()
    assert rows.num_keys_T.tolist() == inputs.num_keys_T.tolist() and rows.num_keys_T.dtype == torch.int32
    assert (rows.token_ids_T.data_ptr() - rows.memory.data_ptr()) % 64 == 0
