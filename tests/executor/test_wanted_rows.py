"""Rows whose hidden state nobody reads end at the last block's attention, and no answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from taped_engine import MOST_ROWS, Engine, layout_named
from tiny_models import LAYOUTS, PAGE_SIZE, Layout, SeededWeights, TinyModel, build_over

from lockstep.attention.backend import Span
from lockstep.core.probe import ProbePoint
from lockstep.core.request import Pooling
from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceResult, SequenceStart, StepPlan, TokenSlice
from lockstep.executor.fused import FusedDecoder
from lockstep.parallel.mesh import Mesh

pytestmark = pytest.mark.suite("cpu", seconds=10)

SPANS = (Span(0, 5, (0, 1)), Span(6, 1, (2, 3)), Span(4, 3, (4, 5)), Span(9, 1, (6, 7, 8)))
NUM_ROWS = 10
TOLERANCE = 1e-5
"""Hidden rows are of order one; a product over fewer rows may add its terms in another order."""

LAST = f"model.layers.{LAYOUTS[0].config['num_hidden_layers'] - 1}"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=2)
SCORED = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class RowCounter:
    """A probe that watches every point, and keeps how many rows it was shown there."""

    def __init__(self) -> None:
        self.num_rows: dict[str, int] = {}

    def wants(self, point: ProbePoint) -> bool:
        return True

    def record(self, point: ProbePoint, value: Any) -> None:
        self.num_rows[point.name] = len(value)

    def begin_step(self, step_id: int, rows: Sequence[tuple[int, int]]) -> None:
        """Rows need no names here."""


def stepped(layout: Layout, wanted: Sequence[int] | None) -> tuple[TinyModel, torch.Tensor]:
    tiny = TinyModel(build_over(Mesh.solo(), SeededWeights()), layout.config)
    with torch.inference_mode():
        return tiny, tiny.step(SPANS, wanted)[0]


@pytest.mark.parametrize("wanted", [(9, 4, 5), (8,), (0, 7, 7, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_wanted_rows_are_those_of_a_step_that_wants_all(layout: Layout, wanted: tuple[int, ...]) -> None:
    """In their order; and all keys and values are stored, to the bit."""
    every, every_TD = stepped(layout, None)
    some, some_RD = stepped(layout, wanted)
    torch.testing.assert_close(some_RD, every_TD[list(wanted)], rtol=0, atol=TOLERANCE)
    apart = torch.pdist(every_TD).min()
    assert apart > 1000 * TOLERANCE, "another row in the place of one would show"
    for kept, twin in zip(some._pool.layers, every._pool.layers, strict=True):
        assert torch.equal(kept.k_NPSH, twin.k_NPSH) and torch.equal(kept.v_NPSH, twin.v_NPSH)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_others_end_at_the_last_attention(layout: Layout) -> None:
    counter = RowCounter()
    build = build_over(Mesh.solo(), SeededWeights())
    build.probe = counter
    with torch.inference_mode():
        TinyModel(build, layout.config).step(SPANS, (9, 4, 5))
    names, output = list(counter.num_rows), f"{LAST}.self_attn.o_proj"
    before, after = names[: names.index(output)], names[names.index(output) :]
    assert f"{LAST}.self_attn" in before and {f"{LAST}.post_attention_layernorm", "model.norm"} <= set(after)
    assert {counter.num_rows[name] for name in before} == {NUM_ROWS}
    assert {counter.num_rows[name] for name in after} == {3}


def test_a_whole_decoder_gives_the_wanted_rows() -> None:
    class Program:
        def step(self, token_ids_T: torch.Tensor, *given: Any) -> torch.Tensor:
            return token_ids_T[:, None] * torch.ones(2)

    tiny = TinyModel(build_over(Mesh.solo(), SeededWeights()), layout_named("llama").config)
    tiny.model = FusedDecoder(tiny.model, Program())
    tiny.model.logits = lambda hidden_RD: hidden_RD  # type: ignore[method-assign]
    tiny._backend = _Planless()  # type: ignore[assignment]
    every_TD = tiny.step(SPANS)[0]
    assert torch.equal(tiny.step(SPANS, (9, 4, 5))[0], every_TD[[9, 4, 5]])


class _Planless:
    """In the place of a backend for a program that is told of spans and pages."""

    spans = pages = None

    def plan(self, spans: Sequence[Span], **how: Any) -> _Planless:
        return self


def piece(seq_id: int, start: int, num_tokens: int, *, samples: bool) -> TokenSlice:
    """Of a sequence whose pages are 8 s .. 8 s + 7."""
    first, end = -(-start // PAGE_SIZE), -(-(start + num_tokens) // PAGE_SIZE)
    return TokenSlice(
        seq_id, start, num_tokens, tuple(8 * seq_id + page for page in range(first, end)), samples
    )


def begun(
    seq_id: int, length: int, params: SamplingParams = GREEDY, pooling: Pooling | None = None
) -> SequenceStart:
    tokens = tuple((7 * seq_id + 3 * at) % 90 for at in range(length))
    return SequenceStart(seq_id, params, tokens, length, 0, (), pooling)


def singles(starts: dict[int, int]) -> tuple[TokenSlice, ...]:
    """One token of each sequence, from where it is."""
    return tuple(piece(seq_id, start, 1, samples=True) for seq_id, start in starts.items())


SCRIPT = (
    # A prompt, and the first part of one.
    StepPlan(0, (begun(0, 9), begun(1, 14)), (), (piece(0, 0, 9, samples=True), piece(1, 0, 7, samples=False))),
    StepPlan(1, (), (), (*singles({0: 9}), piece(1, 7, 5, samples=False))),
    # Nothing samples.
    StepPlan(2, (begun(2, 10),), (), (piece(1, 12, 1, samples=False), piece(2, 0, 8, samples=False))),
    # Most rows sample.
    StepPlan(3, (), (), (*singles({0: 10, 1: 13}), piece(2, 8, 2, samples=True))),
    # A prompt that is scored and two that are embedded, beside single tokens.
    StepPlan(
        4,
        (begun(3, 8, SCORED), begun(4, 11, pooling="mean"), begun(5, 3, pooling="last")),
        (),
        (
            *singles({0: 11, 2: 10}),
            piece(3, 0, 5, samples=False),
            piece(4, 0, 11, samples=False),
            piece(5, 0, 3, samples=False),
        ),
    ),
    StepPlan(5, (), (4, 5), (*singles({0: 12, 1: 14, 2: 11}), piece(3, 5, 3, samples=True))),
    # Many rows in the first slice; the next step starts from what each sequence sampled here.
    StepPlan(6, (begun(6, 20),), (3,), (piece(6, 0, 20, samples=True), *singles({0: 13, 1: 15, 2: 12}))),
    StepPlan(7, (), (), singles({0: 14, 1: 16, 2: 13, 6: 20})),
    StepPlan(8, (begun(3, 31),), (0,), (piece(3, 0, 31, samples=True), *singles({6: 21, 1: 17}))),
)
NUM_SAMPLED = (1, 1, 0, 3, 2, 4, 4, 4, 3)
NUM_COMPUTED = (1, 1, 1, 4, 21, 6, 4, 4, 3)
"""Rows of each step that are computed to the end when steps are not recorded."""


def counted(engine: Engine) -> list[int]:
    """Grows by the rows that reach the last block's feed-forward part, whenever any do."""
    num_rows: list[int] = []
    layer = engine.model._layers[-1]  # type: ignore[attr-defined]
    mlp = layer._mlp

    def watched(ctx: Any, update: Any, residual_TD: torch.Tensor) -> Any:
        num_rows.append(len(residual_TD))
        return mlp(ctx, update, residual_TD)

    layer._mlp = watched
    return num_rows


def assert_same(found: SequenceResult, expected: SequenceResult) -> None:
    """The same tokens, the same log-probabilities and embeddings up to rounding."""
    assert found.token_ids == expected.token_ids and found.error is None and expected.error is None
    for kind in ("logprobs", "prompt_logprobs"):
        ones, others = getattr(found, kind), getattr(expected, kind)
        assert [one.token_id for one in ones] == [other.token_id for other in others]
        assert [one.logprob for one in ones] == pytest.approx([other.logprob for other in others], abs=1e-5)
    assert (found.embedding is None) == (expected.embedding is None)
    if found.embedding is not None:
        assert found.embedding == pytest.approx(expected.embedding, abs=1e-5)


def assert_answers_like_one_that_computes_all(name: str, engine: Engine) -> None:
    plain = Engine(layout_named(name), wants_all=True)
    num_rows, num_found = counted(plain), []
    for plan in SCRIPT:
        expected, found = plain.runner.execute(plan), engine.runner.execute(plan)
        for one, other in zip(found.sequences, expected.sequences, strict=True):
            assert_same(one, other)
        num_found.append(sum(len(one.token_ids) for one in found.sequences))
        if plan.step_id == 4:
            assert [len(one.prompt_logprobs) for one in found.sequences] == [0, 0, 5, 0, 0]
            assert [one.embedding is not None for one in found.sequences] == [False] * 3 + [True] * 2
    assert tuple(num_found) == NUM_SAMPLED
    assert num_rows == [plan.num_tokens for plan in SCRIPT]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_runner_leaves_out_rows_that_nobody_reads(name: str) -> None:
    engine = Engine(layout_named(name))
    num_rows = counted(engine)
    assert_answers_like_one_that_computes_all(name, engine)
    assert tuple(num_rows) == NUM_COMPUTED


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("with_graphs", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_pieces_leave_them_out_too(name: str, with_graphs: bool, recorded: bool) -> None:
    """Steps of three sizes with 1 to 4 rows that sample, of which two sizes want all rows as well."""
    engine = Engine(layout_named(name), with_pieces=True, with_graphs=with_graphs)
    sizes = [(16, False), (16, True), (32, False), (32, True), (40, False)]
    with torch.inference_mode():
        for size, wants_all in sizes if recorded else ():
            engine.pieces.record(size, wants_all=wants_all)
    num_rows = counted(engine)
    assert_answers_like_one_that_computes_all(name, engine)
    # Each is run when it is first wanted, with the rows of as many sequences as there can be or with all.
    some = MOST_ROWS + 1
    whole = [4, 4] if with_graphs else []
    assert num_rows == (whole if recorded else [some, some, 32, 16, some, *whole, some])
    assert sorted(engine.pieces._steps, key=str) == [(16, 7), (16, None), (32, 7), (32, None), (40, 7)]


def test_sizes_that_hardly_exceed_the_sequences_compute_all_rows() -> None:
    engine = Engine(layout_named("llama"), with_pieces=True)
    for most_sequences, wanted in ((8, 8), (9, None)):
        engine.pieces._most_sequences = most_sequences
        with torch.inference_mode():
            step = engine.pieces.step(16)
        assert (None if step.wanted_R is None else len(step.wanted_R)) == wanted
    with torch.inference_mode():
        engine.recorded.record_largest()  # type: ignore[union-attr]
    assert list(engine.pieces._steps)[-1] == (40, None), "the largest memory is that of a step that wants all"
