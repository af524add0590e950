"""What a step asks of the rows of its slices."""

from __future__ import annotations

import pytest
import torch

from lockstep.attention.span_backend import SpanBackend
from lockstep.core.request import Pooling
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice
from lockstep.executor.inputs import build_inputs
from lockstep.executor.sequences import SequenceTable

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
