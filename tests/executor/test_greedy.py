"""Greedy steps of single tokens, whose choice is replayed too: the bits, and the same answers as kernel by kernel."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tape_graph import TapeGraph
from taped_engine import MOST_ROWS, PARAMS, Engine, decode_plan, layout_named, plans
from tiny_models import CONTEXT_LENGTH, PAGE_SIZE

from lockstep.core.sampling import SamplingParams
from lockstep.core.step import SequenceResult, SequenceStart, StepPlan, TokenSlice
from lockstep.executor.hooks import SamplerHook
from lockstep.executor.sampler import STOCK, SamplingKernels
from lockstep.ops.contract import Kernel
from lockstep.ops.registry import kernels

pytestmark = pytest.mark.suite("cpu", seconds=20)

BARE = SamplingParams(temperature=0.0, seed=0, ignore_eos=True)
DRAWING = SamplingParams(temperature=1.0, seed=5, ignore_eos=True)
KINDS = {
    "draws": DRAWING,
    "filters": replace(DRAWING, top_k=5, top_p=0.9),
    "penalties": replace(BARE, presence_penalty=0.6),
    "bias": replace(BARE, logit_bias={3: 2.0}),
    "min_tokens": replace(BARE, min_tokens=100, stop_token_ids=(1, 2)),
    "scored": PARAMS,
}
ASKING = SamplingKernels(
    *(replace(kernel, asks_host=True) for kernel in (STOCK.argmax, STOCK.sample, STOCK.argmax))
)


def choose_on_tape(
    logits_RV: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor
) -> torch.Tensor:
    """choose_greedy without asking the host which rows are nobody's."""
    best_R, token_ids_R = logits_RV.max(-1)
    last_tokens_S.index_copy_(0, owners_R, token_ids_R)
    last_tokens_S[:1].zero_()
    return torch.stack((token_ids_R.int(), (best_R + 0.0).view(torch.int32)))


TOGETHER = SamplingKernels(choose_greedy=Kernel("choose_greedy", "test", choose_on_tape))
ASKING_TOGETHER = SamplingKernels(choose_greedy=replace(kernels("choose_greedy")[0], asks_host=True))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair(sampling: SamplingKernels = STOCK) -> tuple[Engine, Engine]:
    """One whose choices are recorded, and one whose choices are made kernel by kernel after the same replays."""
    layout = layout_named("llama")
    recorded = Engine(layout, with_graphs=True, sampling=sampling)
    return recorded, Engine(layout, with_graphs=True, sampling=ASKING)


def num_choices(engine: Engine) -> int:
    """Replays of graphs that choose: of each size the third, after the step and its scores."""
    assert len(engine.made) % 3 == 0
    return sum(graph.num_replays for graph in engine.made[2::3])


def last_tokens(engine: Engine) -> list[int]:
    """By slot, nobody's first."""
    ids: torch.Tensor = engine.recipe.last_tokens.ids_S
    return ids.tolist()


def found(engine: Engine, plan: StepPlan) -> tuple[list[SequenceResult], list[int]]:
    """What a step finds, with the bits of the best scores among it."""
    step: Any = engine.runner.submit(plan)
    chosen = step.findings.chosen
    best = chosen._host[1, : len(step.findings.sampled)].tolist() if chosen is not None else []
    return list(step.result().sequences), best


@pytest.mark.parametrize("sampling", [STOCK, TOGETHER], ids=["in parts", "together"])
def test_answers_are_bit_equal_to_those_of_separate_kernels(sampling: SamplingKernels) -> None:
    """Batches of six down to one, so that most are padded; only the choice of each is replayed or not."""
    one, other = pair(sampling)
    script = plans({0: 3, 1: 9, 2: 1, 3: 4, 4: 12, 5: 2}, [4, 0, 2, 5, 1], 12, BARE)
    for plan in script:
        assert found(one, plan) == found(other, plan)
        assert last_tokens(one) == last_tokens(other) and last_tokens(one)[0] == 0
    assert num_choices(one) == 12
    assert len(one.made) == 12 and not any(graph.num_replays for graph in one.made[1::3]), "nobody wants scores"
    assert [sum(graph.num_replays for graph in other.made[at::2]) for at in (0, 1)] == [12, 12], (
        "no choice was recorded"
    )


@pytest.mark.parametrize("sampling", [STOCK, TOGETHER], ids=["in parts", "together"])
def test_the_recorded_choice_has_the_bits_of_the_eager_one(sampling: SamplingKernels) -> None:
    engine = Engine(layout_named("qwen3"), with_graphs=True, sampling=sampling)
    with torch.inference_mode():
        for plan in plans({0: 3, 1: 9, 2: 5}, [], 4, BARE):
            engine.runner.execute(plan)
        computed = engine.graphs.step(4).computed
        assert computed.scores is not None and computed.choice is not None
        best_T, token_ids_T = computed.scores.replay().max(-1)
        replayed, kept = computed.choice.replay().clone(), last_tokens(engine)
        assert torch.equal(engine.graphs.step(4).choose(computed.hidden_RD), replayed)
        assert last_tokens(engine) == kept
    assert replayed[0].tolist() == token_ids_T.tolist()
    assert replayed[1].view(torch.float32).tolist() == best_T.tolist()


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_that_want_more_come_and_go(kind: str) -> None:
    """While one is there nothing is chosen by graph, before and after it is; what it samples last is not lost."""
    one, other = pair()
    script = plans({0: 3, 1: 9, 2: 2}, [], 2, BARE)
    late = plans({3: 5}, [], 0, KINDS[kind])[0]
    script.append(StepPlan(10, late.started, (), late.slices))
    at = {0: 5, 1: 11, 2: 4, 3: 5}
    for step in range(4):
        script.append(decode_plan(11 + step, {seq_id: start + step for seq_id, start in at.items()}))
    script.append(decode_plan(20, {0: 9, 1: 15, 2: 8}, ended=[3]))
    script.append(decode_plan(21, {0: 10, 1: 16, 2: 9}))
    choices = []
    for plan in script:
        assert found(one, plan) == found(other, plan)
        assert last_tokens(one) == last_tokens(other)
        choices.append(num_choices(one))
    assert choices == [0, 1, 2, 2, 2, 2, 2, 2, 3, 4]


def test_a_row_that_does_not_sample_is_left_out() -> None:
    """A prompt that is computed token by token beside sequences that decode: its last token alone decides."""
    one, other = pair()
    late = SequenceStart(3, BARE, (5, 17, 60), 3, 0, ())
    script = plans({0: 3, 1: 9}, [], 0, BARE)
    for at in range(4):
        (piece,) = decode_plan(at, {3: at}).slices
        started = (late,) if at == 0 else ()
        others = decode_plan(at, {0: 3 + at, 1: 9 + at}).slices
        script.append(StepPlan(at + 1, started, (), (replace(piece, samples=at >= 2), *others)))
    choices = []
    for plan in script:
        assert found(one, plan) == found(other, plan)
        assert last_tokens(one) == last_tokens(other)
        choices.append(num_choices(one))
    assert choices == [0, 0, 0, 1, 2]


class Follower:
    """Follows sequence 1 as long as it is there."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def start(self, seq_id: int, start: SequenceStart) -> None: ...

    def end(self, seq_id: int) -> None: ...

    def active(self, seq_ids: Sequence[int]) -> bool:
        return 1 in seq_ids

    def mask(self, seq_ids: Sequence[int], logits: torch.Tensor) -> None:
        logits[seq_ids.index(1), :60] = float("-inf")

    def accept(self, seq_id: int, token_id: int) -> bool:
        self.heard.append(seq_id)
        return False


def test_a_hook_that_follows_a_sequence_sees_its_scores() -> None:
    engine, hook = Engine(layout_named("llama"), with_graphs=True), Follower()
    hooks: tuple[SamplerHook, ...] = (hook,)
    engine.runner._hooks = engine.runner._sampler._hooks = hooks
    for plan in plans({0: 3, 1: 9}, [], 2, BARE):
        assert engine.runner.execute(plan).sequences[1].token_ids[0] >= 60
    assert num_choices(engine) == 0
    engine.runner.execute(decode_plan(9, {0: 5}, ended=[1]))
    assert num_choices(engine) == 1 and hook.heard == [0, 1] * 3


def test_padding_leaves_other_sequences_their_tokens() -> None:
    """Steps of three of five, in a graph of four rows: the others, and nobody, keep what they had."""
    engine = Engine(layout_named("llama"), with_graphs=True)
    lengths = {0: 3, 1: 9, 2: 1, 3: 4, 4: 12}
    engine.runner.execute(plans(lengths, [], 0, BARE)[0])
    before = last_tokens(engine)
    result = engine.runner.execute(decode_plan(1, {seq_id: lengths[seq_id] for seq_id in (1, 2, 4)}))
    after, states = last_tokens(engine), engine.runner._sequences
    sampled = {states[each.seq_id].slot: each.token_ids[0] for each in result.sequences}
    assert num_choices(engine) == 1 and len(sampled) == 3
    assert after == [sampled.get(slot, token_id) for slot, token_id in enumerate(before)] and after[0] == 0


def preempting(seed: int) -> Iterable[StepPlan]:
    """Sequences that leave at random and come back, with other pages, among those that go on: always room for all."""
    print(f"seed {seed}")
    chooser, free = random.Random(seed), list(range(64))
    at: dict[int, int] = {}
    pages: dict[int, list[int]] = {}
    for step_id in range(80):
        ended = [seq_id for seq_id in at if chooser.random() < 0.12 or at[seq_id] >= CONTEXT_LENGTH]
        for seq_id in ended:
            free += pages.pop(seq_id)
            del at[seq_id]
        chooser.shuffle(free)
        started, slices = [], []
        for seq_id in chooser.sample(sorted(at), len(at)):
            new = (free.pop(),) if at[seq_id] % PAGE_SIZE == 0 else ()
            pages[seq_id] += new
            slices.append(TokenSlice(seq_id, at[seq_id], 1, new, True))
            at[seq_id] += 1
        absent = [seq_id for seq_id in range(MOST_ROWS) if seq_id not in at]
        if not at or (absent and chooser.random() < 0.4):
            seq_id, length = chooser.choice(absent), chooser.choice([1, 1, 2, 7])
            params = DRAWING if chooser.random() < 0.1 else BARE
            tokens = tuple(chooser.randrange(90) for _ in range(length))
            pages[seq_id] = [free.pop() for _ in range(-(-length // PAGE_SIZE))]
            started.append(SequenceStart(seq_id, params, tokens, length, 0, ()))
            slices.append(TokenSlice(seq_id, 0, length, tuple(pages[seq_id]), True))
            at[seq_id] = length
        yield StepPlan(step_id, tuple(started), tuple(ended), tuple(slices))


@pytest.mark.parametrize("seed", range(3))
def test_pages_and_slots_that_others_had_before(seed: int) -> None:
    """Against steps that are planned and computed anew each time, and, for the bits, against separate kernels."""
    (one, other), eager = pair(), Engine(layout_named("llama"))
    for plan in preempting(seed):
        results, best = found(one, plan)
        assert (results, best) == found(other, plan)
        assert last_tokens(one)[0] == 0
        for mine, twin in zip(results, eager.runner.execute(plan).sequences, strict=True):
            assert mine.token_ids == twin.token_ids and mine.error is None
    assert 5 < num_choices(one) < sum(graph.num_replays for graph in other.made), "some by graph, and some not"


def test_a_row_of_scores_that_are_no_numbers_fails_alone() -> None:
    one, other = pair()
    for engine in (one, other):
        engine.runner.execute(plans({0: 3, 1: 9, 2: 2}, [], 0, BARE)[0])
        engine.pool.layers[-1].v_NPSH[:, 8] = float("nan")
    answers = [engine.runner.execute(decode_plan(1, {0: 3, 1: 9, 2: 2})).sequences for engine in (one, other)]
    assert answers[0] == answers[1] and num_choices(one) == 1
    assert [bool(each.token_ids) for each in answers[0]] == [True, False, True]
    assert "not numbers" in (answers[0][1].error or "")


class Staged:
    """The sizes of the arrays that a step copies to the device."""

    def __init__(self, engine: Engine) -> None:
        self.sizes: list[int] = []
        transfers = engine.runner._transfers
        stage = transfers.stage

        def noted(array: Any) -> torch.Tensor:
            self.sizes.append(array.size)
            return stage(array)

        transfers.stage = noted  # type: ignore[method-assign]

    def of(self, engine: Engine, plan: StepPlan) -> int:
        self.sizes.clear()
        engine.runner.execute(plan)
        return len(self.sizes)


def test_a_step_copies_its_rows_and_page_tables_that_changed() -> None:
    engine = Engine(layout_named("llama"), with_graphs=True)
    staged = Staged(engine)
    first, *others = plans({0: 3, 1: 9}, [], 3 * PAGE_SIZE, BARE)
    engine.runner.execute(first)
    staged.of(engine, others[0])
    for plan in others[1:]:
        is_new = any(piece.new_page_ids for piece in plan.slices)
        assert staged.of(engine, plan) == 1 + is_new, plan


def test_the_largest_size_is_recorded_before_others_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.executor.graphs.SMALLEST", 1)
    engine = Engine(layout_named("llama"), with_graphs=True)
    with torch.inference_mode():
        assert engine.graphs.step(1) is engine.graphs.step(1) and engine.graphs.missing == [2, 4, 6]
        assert len(engine.graphs.step(2).rows.token_ids_T) == 2 and engine.graphs.missing == [4]
    assert all(isinstance(graph, TapeGraph) for graph in engine.made) and len(engine.made) == 9


def test_no_request_waits_for_the_smallest_sizes_or_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.executor.graphs.SMALLEST", 2)
    engine = Engine(layout_named("llama"), with_graphs=True)
    with torch.inference_mode():
        engine.graphs.record_first()
        assert engine.graphs.sizes == (1, 2, 4, 6) and engine.graphs.missing == [4]


def test_a_choice_that_asks_the_host_is_made_in_parts_beside_the_graph() -> None:
    one, other = pair(ASKING_TOGETHER)
    for plan in plans({0: 3, 1: 9}, [], 3, BARE):
        assert found(one, plan) == found(other, plan)
    assert len(one.made) == len(other.made) == 2, "no choice was recorded"


def test_one_kernel_of_all_that_a_choice_takes_is_the_one_that_is_recorded() -> None:
    seen: list[int] = []

    def choose(logits_RV: torch.Tensor, owners_R: torch.Tensor, last_tokens_S: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits_RV))
        return choose_on_tape(logits_RV, owners_R, last_tokens_S)

    sampling = SamplingKernels(choose_greedy=Kernel("choose_greedy", "test", choose))
    engine, _ = pair(sampling)
    for plan in plans({0: 3, 1: 9}, [], 3, BARE):
        engine.runner.execute(plan)
    assert set(seen) == {2} and num_choices(engine) == 3
