"""Steps in pieces between attention: sizes, any mix of spans, the bits of the same step without graphs."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from taped_engine import MOST_PIECED_ROWS, MOST_ROWS, Engine, decode_plan, layout_named, plans
from tiny_models import PAGE_SIZE

from lockstep.core.step import StepPlan
from lockstep.executor.inputs import StepInputs, build_inputs
from lockstep.executor.page_copies import CopyingExecutor
from lockstep.executor.pieces import piece_sizes
from lockstep.executor.sequences import SequenceTable
from lockstep.kv.pool.host_pool import HostPool

pytestmark = pytest.mark.suite("cpu", seconds=8)

NAMES = ("llama", "qwen3")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def mixed_script() -> list[StepPlan]:
    """Six prompts; single tokens, among which a further prompt comes, and sequences that end."""
    script = plans({0: 3, 1: 9, 2: 1, 3: 4, 4: 12, 5: 2}, [4, 0, 2, 5, 1], 12)
    late = plans({6: 5}, [], 0)[0]
    script[5] = StepPlan(5, late.started, script[5].ended, (*script[5].slices, *late.slices))
    assert [piece.num_tokens for piece in script[5].slices] == [1, 1, 1, 1, 5], "one step with both"
    return script


def test_sizes_are_few_and_padding_is_small() -> None:
    for most in (1, 16, 17, 100, 128, 1000, 4096):
        sizes = piece_sizes(most)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 49
        for rows in range(1, most + 1):
            size = next(size for size in sizes if size >= rows)
            assert size - rows < max(16, rows / 8 + 1), (most, rows, size)


@pytest.mark.parametrize("with_graphs", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_runner_with_pieces_answers_like_one_without(name: str, with_graphs: bool) -> None:
    """With graphs of single tokens beside them, and without."""
    layout = layout_named(name)
    eager, pieced = Engine(layout), Engine(layout, with_pieces=True, with_graphs=with_graphs)
    for plan in mixed_script():
        wanted, found = eager.runner.execute(plan), pieced.runner.execute(plan)
        for one, other in zip(found.sequences, wanted.sequences, strict=True):
            assert one.token_ids == other.token_ids and one.error is None
            if one.token_ids:
                assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
    for kept, twin in zip(pieced.pool.layers, eager.pool.layers, strict=True):
        torch.testing.assert_close(kept.k_NPSH, twin.k_NPSH, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.v_NPSH, twin.v_NPSH, atol=1e-5, rtol=1e-5)
    first, *others = pieced.made
    assert first.beside is None and all(graph.beside is first for graph in others), "one memory for all"
    num_layers = len(pieced.pool.layers)
    replays = sum(graph.num_replays for graph in pieced.made)
    num_pieced = 2 if with_graphs else len(mixed_script())
    num_whole = len(mixed_script()) - num_pieced
    num_replayed = num_pieced - len(pieced.pieces._steps)
    assert replays == num_replayed * (num_layers + 1) + num_whole * 2, "a whole step and its scores"


def filled(engine: Engine, plan: StepPlan, sequences: SequenceTable) -> StepInputs:
    num_rows = engine.pieces.num_rows_for(plan)
    assert num_rows is not None
    return build_inputs(plan, sequences, PAGE_SIZE, num_rows=num_rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_gives_the_bits_of_its_step_run_eagerly(name: str) -> None:
    """Each step of a script in turn over the same memory: what the host knew while recording must not come back.

    The first of a size is run, not replayed.
    """
    engine, sequences = Engine(layout_named(name)), SequenceTable(MOST_ROWS + 1)
    seen: list[torch.Tensor] = []
    sizes: list[int] = []
    with torch.inference_mode():
        for plan in mixed_script():
            sequences.apply(plan)
            inputs = filled(engine, plan, sequences)
            computed = engine.pieces.compute(inputs)
            replayed = computed.hidden_RD.clone()
            assert len(replayed) == MOST_ROWS + 1 and replayed.isfinite().all()
            step = engine.pieces.step(len(computed.rows.token_ids_T))
            num_rows = len(computed.rows.token_ids_T)
            assert step.is_recorded == (num_rows in sizes)
            sizes.append(num_rows)
            planned = engine.attention.plan(
                inputs.spans, page_size=PAGE_SIZE, windows=engine.build.windows, device=torch.device("cpu")
            )
            assert torch.equal(step.run(engine.attention, planned), replayed)
            assert not any(torch.equal(replayed[:1], other) for other in seen)
            seen.append(replayed[:1])
            engine.runner.execute(plan)


def test_padding_is_stored_nowhere() -> None:
    engine = Engine(layout_named("llama"))
    with torch.inference_mode():
        for num_rows in engine.pieces.sizes:
            step = engine.pieces.step(num_rows)
            nothing = build_inputs(StepPlan(0), SequenceTable(MOST_ROWS), PAGE_SIZE, num_rows=num_rows)
            assert engine.pieces.compute(nothing).hidden_RD.isfinite().all()
            assert step.rows.slots_T.eq(-1).all()
    assert not any(kv.k_NPSH.any() or kv.v_NPSH.any() for kv in engine.pool.layers)


def test_steps_that_no_pieces_hold() -> None:
    pieces = Engine(layout_named("llama")).pieces
    longer, single = plans({0: MOST_PIECED_ROWS}, [], 0)[0], decode_plan(0, {0: 3})
    assert pieces.num_rows_for(longer) == MOST_PIECED_ROWS and pieces.num_rows_for(single) == 16
    assert pieces.num_rows_for(plans({0: MOST_PIECED_ROWS, 1: 1}, [], 0)[0]) is None


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_the_bound_kernels_and_no_others(name: str) -> None:
    """Recording calls each site's bound kernel just as the first step does; replaying calls attention alone."""
    engine, sequences = Engine(layout_named(name)), SequenceTable(MOST_ROWS)
    calls, plan = engine.selector.calls, plans({0: 3}, [], 0)[0]
    sequences.apply(plan)
    with torch.inference_mode():
        inputs = filled(engine, plan, sequences)
        engine.pieces.compute(inputs)
        first = calls.copy()
        engine.pieces.compute(inputs)
        recorded = calls[len(first) :]
        assert recorded == first
        calls.clear()
        engine.pieces.compute(inputs)
    assert not calls, "attention is not bound by this selector"
    sites = {(each.op, each.where) for each in engine.selector.bindings if "(head)" not in each.where}
    assert set(recorded) == sites


@pytest.mark.parametrize("has_host_pool", [False, True])
def test_idle_moments_record_what_is_missing(has_host_pool: bool) -> None:
    """Sizes of both kinds, smallest first, each once; nothing is recorded anew by the steps that want them."""
    engine = Engine(layout_named("llama"), with_graphs=True, with_pieces=True)
    assert engine.pieces.missing == list(engine.pieces.sizes) and engine.graphs.missing == [1, 2, 4, 6]
    for seq_id in (0, 1):
        assert 16 in engine.pieces.missing
        engine.runner.execute(plans({seq_id: 3}, [], 0)[0])
    assert engine.pieces.missing == [32, 40], "recorded when it came for the second time"
    executor = CopyingExecutor(engine.runner, cast(HostPool, None)) if has_host_pool else engine.runner
    num_recorded = 0
    while executor.record_next():
        num_recorded += 1
        assert min(engine.graphs.missing + engine.pieces.missing, default=99) > 1
    assert num_recorded == len(engine.graphs.sizes) + len(engine.pieces.sizes) - 1
    made = len(engine.made)
    engine.runner.execute(decode_plan(1, {0: 3}))
    assert len(engine.made) == made and not Engine(layout_named("llama")).runner.record_next()
