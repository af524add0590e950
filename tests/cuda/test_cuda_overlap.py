"""A decode step makes the host wait for nothing before its result is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep import LLM, SamplingParams
from lockstep.core.step import Pending, StepPlan
from lockstep.executor.runner import ModelRunner

pytestmark = pytest.mark.suite("cuda-1", seconds=90)

PROMPTS = random_prompts((3, 6, 9))


@pytest.fixture(scope="module", params=["full", "off"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    with open_tiny(folder, device="cuda", dtype="bfloat16", overlap="on", graphs=request.param) as opened:
        yield opened


class Watched:
    """Submits steps of single tokens in the mode in which torch raises where the host would wait."""

    def __init__(self, inner: ModelRunner) -> None:
        self._inner = inner
        self.num_watched = 0

    def submit(self, plan: StepPlan) -> Pending:
        if plan.started or any(piece.num_tokens != 1 for piece in plan.slices):
            return self._inner.submit(plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.num_watched += 1
            return self._inner.submit(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 0.8, "seed": 4, "top_k": 40, "top_p": 0.95},
        {"temperature": 0.8, "seed": 4, "min_p": 0.05},
        {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"temperature": 0.0, "logit_bias": {5: 1.0}, "min_tokens": 10},
        {"temperature": 0.0, "logprobs": 3},
    ],
    ids=str,
)
def test_nothing_waits(llm: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, **options)
    expected = llm.generate(PROMPTS, params)  # compiles kernels and records graphs, which waits
    core: Any = llm._engine.rank.core
    runner, core.executor = core.executor, Watched(core.executor)
    try:
        assert [answer.token_ids for answer in llm.generate(PROMPTS, params)] == [
            answer.token_ids for answer in expected
        ]
        assert core.executor.num_watched >= 15
    finally:
        core.executor = runner
