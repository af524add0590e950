"""Greedy steps on an NVIDIA GPU: the bits of the same step without graphs, and the answers of separate kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import make_tiny, open_tiny, random_prompts

from lockstep import SamplingParams
from lockstep.executor.computed import Computed, RecordedEnd
from lockstep.executor.graphs import DecodeGraphs
from lockstep.executor.inputs import StepInputs
from lockstep.executor.sampler import Sampler

pytestmark = pytest.mark.suite("cuda-1", seconds=90)

LENGTHS = (3, 40, 9, 75, 1, 130, 33, 5, 8, 2)


def asked(num_drawing: int) -> list[SamplingParams]:
    """Greedy ones of several lengths; the first ones draw instead, and leave sooner."""
    kinds = [(1.0, 20) if at < num_drawing else (0.0, 40 + at) for at in range(len(LENGTHS))]
    return [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=at, ignore_eos=True)
        for at, (temperature, max_tokens) in enumerate(kinds)
    ]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of every choice that is replayed inside."""
    rows, replay = list[int](), RecordedEnd.replay

    def noted(self: RecordedEnd) -> torch.Tensor:
        result = replay(self)
        if result.dtype == torch.int32:
            rows.append(result.shape[1])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(RecordedEnd, "replay", noted)
        yield rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_replays_give_the_eager_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Hidden rows, scores, choices and what is kept for the next step, of padded steps too, each step once more."""
    make_tiny(tmp_path, "qwen3")
    sizes: list[int] = []
    compute = DecodeGraphs.compute

    def watched(self: Any, inputs: StepInputs) -> Computed:
        computed = compute(self, inputs)
        step = self.step(inputs.facts_5T.shape[1])
        hidden_TD = step.run()
        assert computed.scores is not None and computed.choice is not None
        assert torch.equal(computed.hidden_RD, hidden_TD)
        logits_TV = computed.scores.replay().clone()
        assert torch.equal(step.score(hidden_TD), logits_TV)
        replayed, ids_S = computed.choice.replay().clone(), self._recipe.last_tokens.ids_S
        kept = ids_S.clone()
        assert torch.equal(step.choose(hidden_TD), replayed) and torch.equal(ids_S, kept) and kept[0] == 0
        best_T, token_ids_T = logits_TV.max(-1)
        assert torch.equal(replayed[0].long(), token_ids_T)
        assert torch.equal(replayed[1].view(torch.float32), best_T.float())
        sizes.append(len(replayed[0]))
        return computed

    monkeypatch.setattr(DecodeGraphs, "compute", watched)
    with open_tiny(tmp_path, device="cuda", dtype=dtype, graphs="full", overlap="on") as llm:
        llm.generate(random_prompts(LENGTHS), asked(0))
    assert len(set(sizes)) >= 3, sizes


@pytest.mark.parametrize("pool", [4096, 512], ids=["room for all", "preemptions"])
@pytest.mark.parametrize("num_drawing", [0, 3])
def test_answers_are_those_of_separate_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_drawing: int, pool: int
) -> None:
    """The same replays up to the scores; then the choice as a whole or not."""
    make_tiny(tmp_path, "llama")
    prompts, params = random_prompts(LENGTHS), asked(num_drawing)
    options: dict[str, Any] = {"graphs": "full", "overlap": "on", "max_total_tokens": pool}
    with open_tiny(tmp_path, device="cuda", dtype="bfloat16", **options) as llm:
        with counted(monkeypatch) as rows:
            found = [answer.token_ids for answer in llm.generate(prompts, params)]
        assert len(rows) > 10 and (llm.stats().num_preemptions > 0) == (pool == 512)
        llm.flush_cache()
        monkeypatch.setattr(Sampler, "is_bare", lambda self, sampling: False)
        with counted(monkeypatch) as none:
            apart = [answer.token_ids for answer in llm.generate(prompts, params)]
        assert not none
    assert found == apart
