"""Steps whose sequences have leading keys in common: graphs of their own, and the answers of steps that share none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taped_engine import PARAMS, Engine, layout_named
from tiny_models import PAGE_SIZE

from lockstep.attention import sharing
from lockstep.core.step import SequenceStart, StepPlan, TokenSlice

pytestmark = pytest.mark.suite("cpu", seconds=5)

NUM_SHARED = 2 * PAGE_SIZE
PREFIX = tuple((7 * at + 3) % 90 for at in range(NUM_SHARED))
SHARED_PAGES = (5, 9)
TAILS = ((4, 80, 33), (17,), (2, 60))
STRANGER = tuple((11 * at + 1) % 90 for at in range(NUM_SHARED + 2))


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(sharing, "FEWEST_SAVED", PAGE_SIZE)


def script() -> list[StepPlan]:
    """Three sequences with one prefix, which the first computes, and one of its own; two of the three end early."""
    prompts = [(*PREFIX, *tail) for tail in TAILS]
    started = [SequenceStart(0, PARAMS, prompts[0], len(prompts[0]), 0, ())]
    slices = [TokenSlice(0, 0, len(prompts[0]), (*SHARED_PAGES, 20), True)]
    for seq_id in (1, 2):
        length = len(prompts[seq_id])
        started.append(SequenceStart(seq_id, PARAMS, prompts[seq_id], length, NUM_SHARED, SHARED_PAGES))
        slices.append(TokenSlice(seq_id, NUM_SHARED, length - NUM_SHARED, (20 + seq_id,), True))
    started.append(SequenceStart(3, PARAMS, STRANGER, len(STRANGER), 0, ()))
    slices.append(TokenSlice(3, 0, len(STRANGER), (40, 41, 42), True))
    made = [StepPlan(0, tuple(started), (), tuple(slices))]
    lengths = {seq_id: len(prompt) for seq_id, prompt in enumerate([*prompts, STRANGER])}
    for step, ended in enumerate(((), (), (1,), (), (2,), ()), start=1):
        for seq_id in ended:
            del lengths[seq_id]
        singles = []
        for seq_id, at in lengths.items():
            pages = (50 + 4 * seq_id + at // PAGE_SIZE - 2,) if at % PAGE_SIZE == 0 else ()
            singles.append(TokenSlice(seq_id, at, 1, pages, True))
        made.append(StepPlan(step, (), ended, tuple(singles)))
        lengths = {seq_id: at + 1 for seq_id, at in lengths.items()}
    return made


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "modes", [{"with_graphs": True}, {"with_pieces": True}, {}], ids=["graphs", "pieces", "eager"]
)
def test_answers_are_those_of_steps_that_share_nothing(name: str, modes: dict[str, Any]) -> None:
    plain, engine = Engine(layout_named(name)), Engine(layout_named(name), shares=True, **modes)
    for plan in script():
        wanted, found = plain.runner.execute(plan), engine.runner.execute(plan)
        assert [one.seq_id for one in found.sequences] == [piece.seq_id for piece in plan.slices]
        for one, other in zip(found.sequences, wanted.sequences, strict=True):
            assert one.token_ids == other.token_ids and one.error is None
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
    if "with_graphs" in modes:
        # Four, then three rows share; the last two do not. A graph of four rows does for three.
        assert sorted(engine.graphs._sharing) == [4] and 2 in engine.graphs._recorded


def test_a_shared_step_reads_the_pages_of_one_sequence() -> None:
    """So that it fails where sequences are said to share what they do not."""
    engine = Engine(layout_named("llama"), with_graphs=True, shares=True)
    plain = Engine(layout_named("llama"))
    finder = engine.attention._decode._finder  # type: ignore[attr-defined]
    own = finder.of

    def too_much(spans: Any) -> Any:
        found = own(spans)
        if found is not None:
            found.shared_keys_B[found.shared_keys_B > 0] = NUM_SHARED + PAGE_SIZE
        return found

    finder.of = too_much
    differs = False
    for plan in script():
        wanted, found = plain.runner.execute(plan), engine.runner.execute(plan)
        pairs = zip(found.sequences, wanted.sequences, strict=True)
        differs |= any(abs(one.logprobs[0].logprob - other.logprobs[0].logprob) > 1e-3 for one, other in pairs)
    assert differs
