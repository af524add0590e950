"""Log-probabilities, penalties and embeddings through `LLM`, recomputed with transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import END_ID, make_tiny, open_tiny, random_prompts

from lockstep.core.errors import InvalidRequest
from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM

pytestmark = pytest.mark.suite("cpu")

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
TOLERANCE = 1e-4


@dataclass
class Pair:
    """One tiny model, ours and theirs."""

    path: Path
    theirs: Any
    ours: LLM

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] of what follows each token."""
        logprobs: torch.Tensor = self.theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return logprobs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("llama")
    theirs = make_tiny(path)
    with open_tiny(path, chunked_prefill_size=16) as ours:
        yield Pair(path, theirs, ours)


def test_logprobs_of_prompt_and_answer(pair: Pair) -> None:
    for prompt in random_prompts((2, 9, 50)):
        (answer,) = pair.ours.generate([prompt], replace(GREEDY, logprobs=4, prompt_logprobs=4))
        tokens = [*prompt, *answer.token_ids]
        expected_TV = pair.logprobs(tokens)
        scored = [*answer.prompt_logprobs, *answer.logprobs]
        assert [one.token_id for one in scored] == tokens[1:]
        for row, one in zip(expected_TV, scored, strict=False):
            assert one.logprob == pytest.approx(row[one.token_id].item(), abs=TOLERANCE)
            best = row.topk(4)
            assert [token_id for token_id, _ in one.top] == best.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def test_repetition_penalty_is_that_of_transformers(pair: Pair) -> None:
    for prompt in random_prompts((3, 30)):
        expected = pair.theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            repetition_penalty=1.4,
            max_new_tokens=30,
            eos_token_id=None,
            pad_token_id=END_ID,
        )
        (answer,) = pair.ours.generate([prompt], replace(GREEDY, repetition_penalty=1.4))
        assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()


def test_presence_and_frequency_penalties_count_generated_tokens(pair: Pair) -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    for prompt in random_prompts((3, 30)):
        tokens, counts = list(prompt), Counter[int]()
        for _ in range(30):
            row = pair.logprobs(tokens)[-1]
            for token_id, count in counts.items():
                row[token_id] -= 1.5 + 0.7 * count
            token_id = int(row.argmax())
            tokens.append(token_id)
            counts[token_id] += 1
        params = replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.7)
        (answer,) = pair.ours.generate([prompt], params)
        assert list(answer.token_ids) == tokens[len(prompt) :]
        assert answer.token_ids != pair.ours.generate([prompt], GREEDY)[0].token_ids, "they must matter"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(pair: Pair, pooling: str) -> None:
    """Prompts longer than a chunk, with cached prefixes the second time."""
    prompts = random_prompts((1, 15, 16, 17, 70))
    for _ in range(2):
        found = pair.ours.embed(prompts, pooling)  # type: ignore[arg-type]
        for prompt, vector in zip(prompts, found, strict=True):
            with torch.no_grad():
                hidden_TD = pair.theirs.model(torch.tensor([prompt])).last_hidden_state[0]
            pooled_D = hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1]
            expected_D = torch.nn.functional.normalize(pooled_D, dim=0)
            torch.testing.assert_close(torch.tensor(vector), expected_D, rtol=0, atol=2e-6)
    assert pair.ours.stats().num_pages_in_use == 0


def test_pooling_is_the_models_own_or_asked_for(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="declares no pooling") as caught:
        pair.ours.embed([[1, 2]])
    assert caught.value.param == "pooling"
    make_tiny(tmp_path)
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with open_tiny(tmp_path) as declared:
        assert declared.card.pooling == "last"
        assert declared.embed([5, 6, 7]) == declared.embed([[5, 6, 7]], "last")
        assert declared.embed([[5, 6, 7]], "mean") != declared.embed([[5, 6, 7]])


def test_embeddings_and_answers_share_an_engine(pair: Pair) -> None:
    prompt = random_prompts((33,))[0]
    (before,) = pair.ours.generate([prompt], GREEDY)
    vector = pair.ours.embed([prompt], "mean")
    assert pair.ours.generate([prompt], GREEDY)[0].token_ids == before.token_ids
    assert pair.ours.embed([prompt], "mean") == vector
