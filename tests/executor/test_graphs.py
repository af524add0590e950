"""Decoding by graphs: sizes, padding, the same bits as the same step without a graph, and the bound kernels alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tape_graph import tape_attention
from taped_engine import HOST, MOST_ROWS, Engine, decode_plan, layout_named, plans
from tiny_models import PAGE_SIZE

from lockstep.attention.torch_backend import TorchBackend
from lockstep.core.step import StepPlan
from lockstep.executor.graphs import ladder, why_no_choice, why_no_graphs
from lockstep.executor.inputs import LastTokens, StepRows, build_inputs
from lockstep.executor.sequences import SequenceTable
from lockstep.ops.registry import contracts, kernels
from lockstep.ops.selection import Binding

pytestmark = pytest.mark.suite("cpu", seconds=8)

NAMES = ("llama", "qwen3")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_sizes_are_few_and_padding_is_small() -> None:
    assert ladder(1) == (1,) and ladder(6) == (1, 2, 4, 6)
    for most in range(1, 300):
        sizes = ladder(most)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 12 + most // 16
        for rows in range(1, most + 1):
            size = next(size for size in sizes if size >= rows)
            assert size - rows < max(1, min(rows, 16)), (most, rows, size)


@pytest.mark.parametrize("name", NAMES)
def test_a_runner_with_graphs_answers_like_one_without(name: str) -> None:
    """Batches of every size from six down to one, and prompts, which no graph holds, among them."""
    layout = layout_named(name)
    eager, graphed = (Engine(layout, with_graphs=flag) for flag in (False, True))
    script = plans({0: 3, 1: 9, 2: 1, 3: 4, 4: 12, 5: 2}, [4, 0, 2, 5, 1], 12)
    late = plans({6: 5}, [], 0)[0]
    script.insert(5, StepPlan(100, late.started, (), late.slices))
    for plan in script:
        wanted, found = eager.runner.execute(plan), graphed.runner.execute(plan)
        for one, other in zip(found.sequences, wanted.sequences, strict=True):
            assert one.token_ids == other.token_ids and one.error is None
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
    for kept, twin in zip(graphed.pool.layers, eager.pool.layers, strict=True):
        torch.testing.assert_close(kept.k_NPSH, twin.k_NPSH, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.v_NPSH, twin.v_NPSH, atol=1e-5, rtol=1e-5)
    assert [sum(graph.num_replays for graph in graphed.made[at::3]) for at in range(3)] == [12, 12, 0]
    assert not eager.made and len(graphed.made) == 3 * len(ladder(MOST_ROWS)) == 12, "steps, scores, choices"
    first, *others = graphed.made
    assert first.beside is None and all(graph.beside is first for graph in others), "one memory for all"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_a_replay_gives_the_bits_of_its_step_run_eagerly(name: str, num_sequences: int) -> None:
    """Filled anew each time: what the host knew while recording must not come back."""
    engine = Engine(layout_named(name), with_graphs=True)
    prompts = {seq_id: 2 + 3 * seq_id for seq_id in range(num_sequences)}
    script = plans(prompts, [], 3)
    sequences = SequenceTable(MOST_ROWS)
    with torch.inference_mode():
        for plan in script:
            engine.runner.execute(plan)
            sequences.apply(plan)
        plan = decode_plan(9, {seq_id: length + 3 for seq_id, length in prompts.items()})
        sequences.apply(plan)
        num_rows = engine.graphs.num_rows_for(plan)
        assert num_rows is not None
        step = engine.graphs.step(num_rows)
        step.fill(build_inputs(plan, sequences, PAGE_SIZE, num_rows=num_rows))
        found = step.replay()
        assert found.scores is not None and found.hidden_RD.isfinite().all()
        hidden_TD, logits_TV = found.hidden_RD.clone(), found.scores.replay().clone()
        again_TD = step.run()
        assert torch.equal(again_TD, hidden_TD) and torch.equal(step.score(again_TD), logits_TV)
        step.fill(build_inputs(StepPlan(10), sequences, PAGE_SIZE, num_rows=num_rows))
        assert not torch.equal(step.replay().hidden_RD[:num_sequences], hidden_TD[:num_sequences])


def test_padding_is_stored_nowhere() -> None:
    engine = Engine(layout_named("llama"), with_graphs=True)
    with torch.inference_mode():
        for num_rows in ladder(MOST_ROWS):
            step = engine.graphs.step(num_rows)
            step.fill(build_inputs(StepPlan(0), SequenceTable(MOST_ROWS), PAGE_SIZE, num_rows=num_rows))
            assert step.replay().hidden_RD.isfinite().all()
    assert not any(kv.k_NPSH.any() or kv.v_NPSH.any() for kv in engine.pool.layers)


def test_inputs_are_padded_with_rows_of_nobody() -> None:
    sequences, plan = SequenceTable(MOST_ROWS), plans({1: 5}, [], 0)[0]
    sequences.apply(plan)
    inputs = build_inputs(plan, sequences, PAGE_SIZE, num_rows=8)
    owner = sequences[1].slot
    assert inputs.facts_5T.tolist() == [
        [7, 10, 13, 16, 19, 0, 0, 0],
        [0, 1, 2, 3, 4, 0, 0, 0],
        [32, 33, 34, 35, 36, -1, -1, -1],
        [0] * 8,
        [owner] * 5 + [0] * 3,
    ]
    assert inputs.num_keys_T.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert len(inputs.spans) == 1 and inputs.first_row_B.tolist() == [0] and inputs.num_rows == 5
    assert build_inputs(plan, sequences, PAGE_SIZE).facts_5T.shape == (5, 5)


def test_tokens_that_the_host_does_not_know_are_taken_from_the_device() -> None:
    """A prompt, and beside it a sequence whose next row is a token that was sampled."""
    sequences, (first,), (second,) = SequenceTable(MOST_ROWS), plans({1: 5}, [], 0), plans({2: 3}, [], 0)
    sequences.apply(first)
    plan = StepPlan(1, second.started, (), (*decode_plan(1, {1: 5}).slices, *second.slices))
    sequences.apply(plan)
    inputs = build_inputs(plan, sequences, PAGE_SIZE)
    one, two = sequences[1].slot, sequences[2].slot
    assert inputs.facts_5T[0].tolist() == [0, 14, 17, 20] and inputs.facts_5T[3].tolist() == [one, 0, 0, 0]
    rows, last_tokens = StepRows(torch.from_numpy(inputs.memory), 4), LastTokens(MOST_ROWS, HOST)
    last_tokens.keep(torch.tensor([two, one]), torch.tensor([88, 77]))
    assert last_tokens.of(rows).ids().tolist() == [77, 14, 17, 20]


def test_steps_that_no_graph_holds() -> None:
    graphs = Engine(layout_named("llama"), with_graphs=True).graphs
    assert graphs.num_rows_for(decode_plan(0, dict.fromkeys(range(5), 3))) == 6
    assert graphs.num_rows_for(decode_plan(0, dict.fromkeys(range(7), 3))) is None
    assert graphs.num_rows_for(plans({0: 2, 1: 1}, [], 0)[0]) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_holds_the_bound_kernels_and_no_others(name: str) -> None:
    """Recording calls each site's bound kernel just as an eager step does; replaying calls nothing of Python."""
    engine = Engine(layout_named(name), with_graphs=True)
    calls = engine.selector.calls
    with torch.inference_mode():
        step = engine.graphs.step(2)
        warm_up, recorded = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        calls.clear()
        hidden_TD = step.run()
        step.score(hidden_TD)
        step.choose(hidden_TD)
        assert calls == recorded == warm_up
        calls.clear()
        step.replay()
    assert not calls
    assert set(recorded) == {(each.op, each.where) for each in engine.selector.bindings}


def binding(op: str, provider: str) -> Binding:
    kernel = next(each for each in kernels(op) if each.provider == provider)
    return Binding(op, "somewhere", kernel, "")


def test_why_a_model_gets_no_graphs() -> None:
    good = [binding(op, "triton") for op in ("rms_norm", "rope", "kv_store", "attention_decode")]
    assert why_no_graphs(good, tape_attention()) is None
    # These two are no part of a step of single tokens.
    rest = [binding("top_k_top_p_sample", "torch"), binding("attention_extend", "torch")]
    assert why_no_graphs([*good, *rest], tape_attention()) is None
    assert why_no_graphs([*good, binding("fused_moe", "torch")], tape_attention()) == (
        "fused_moe.torch reads values on the host"
    )
    assert "reference reads values" in str(why_no_graphs([binding("rms_norm", "reference")], tape_attention()))
    assert why_no_graphs(good, TorchBackend()) == "attention by torch is planned anew for each step"


def test_why_a_choice_is_not_recorded() -> None:
    step = [binding("rms_norm", "triton"), binding("top_k_top_p_sample", "torch")]
    assert why_no_choice([*step, binding("argmax", "triton"), binding("argmax", "torch")]) is None
    assert why_no_choice([*step, binding("argmax", "reference")]) == "argmax.reference reads values on the host"


READS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.unique_consecutive}
READS |= {torch.unique_consecutive, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.numpy}


class ReadsNoted(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.has_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_read |= func in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", sorted(contracts()))
def test_kernels_that_read_values_say_so(op: str) -> None:
    for kernel in kernels(op):
        # Kernels of the host alone are in no graph, and those of other devices cannot run here.
        if kernel.provider == "reference" or kernel.platforms:
            continue
        noted = ReadsNoted()
        cases = [case for case in contracts()[op].cases() if kernel.refuses(case.signature) is None]
        for case in cases[:12]:
            arguments = list(case.make(torch.Generator().manual_seed(1)))
            for at, argument in enumerate(contracts()[op].arguments):
                if argument.constant and kernel.prepare is not None:
                    arguments[at] = kernel.prepare(arguments[at])
            with noted:
                kernel.function(*arguments)
        assert noted.has_read == kernel.asks_host, f"{op}.{kernel.provider}"
