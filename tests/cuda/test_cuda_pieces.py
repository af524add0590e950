"""Steps in pieces on an NVIDIA GPU: the bits of the same step without graphs, and the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep import SamplingParams
from lockstep.executor.computed import Computed
from lockstep.executor.inputs import StepInputs
from lockstep.executor.pieces import PiecedSteps

pytestmark = pytest.mark.suite("cuda-1", seconds=60)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("graphs", ["full", "piecewise"])
def test_replays_give_the_eager_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: str, backend: str
) -> None:
    """Prompts in chunks beside sequences that decode, for every size that this takes; then each step once more.

    Of some steps all rows are wanted, of others only those that sample.
    """
    make_tiny(tmp_path)
    sizes: list[tuple[int, int]] = []
    replayed: list[bool] = []
    compute = PiecedSteps.compute

    def watched(self: Any, inputs: StepInputs) -> Computed:
        computed = compute(self, inputs)
        kept, wants_all = computed.hidden_RD.clone(), inputs.wanted_row_R is None
        step = self.step(inputs.facts_5T.shape[1], wants_all=wants_all)
        plan = self._attention.plan(
            inputs.spans, page_size=self._pool.page_size, windows=self._windows, device=self._device
        )
        assert torch.equal(step.run(self._attention, plan), kept)
        sizes.append((len(computed.rows.token_ids_T), len(kept)))
        replayed.append(step.is_recorded)
        return computed

    monkeypatch.setattr(PiecedSteps, "compute", watched)
    prompts = random_prompts((3, 40, 9, 75, 1, 130, 33))
    options = {"attention_backend": backend, "chunked_prefill_size": 48, "device": "cuda", "dtype": "bfloat16"}
    with open_tiny(tmp_path, graphs=graphs, max_running_requests=8, **options) as llm:
        pieced = [answer.token_ids for answer in llm.generate(prompts, GREEDY)]
        for _ in range(2):
            llm.generate(prompts[:2], replace(GREEDY, prompt_logprobs=0))
    assert not replayed[0] and sum(replayed) > 2, "the first of a size is run, not replayed"
    assert len({rows for rows, _ in sizes}) >= 2, sizes
    assert {wanted == rows for rows, wanted in sizes} == {False, True}, sizes
    assert all(len(tokens) == 12 for tokens in pieced)


def test_answers_are_those_of_eager_steps(tmp_path: Path) -> None:
    """In float32, where padding rows cannot tip a choice."""
    make_tiny(tmp_path)
    prompts = random_prompts((3, 40, 9, 75, 1, 130, 33))
    answers = []
    for how in ("piecewise", "off"):
        options = {"graphs": how, "extend_graphs": how, "chunked_prefill_size": 48, "max_running_requests": 8}
        with open_tiny(tmp_path, device="cuda", dtype="float32", **options) as llm:
            answers.append([answer.token_ids for answer in llm.generate(prompts, GREEDY)])
    assert answers[0] == answers[1]
