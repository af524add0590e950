"""What `lm-eval --model local-completions` asks and reads, replayed: its tasks are in lm_eval_task/.

`python bench/engine_report.py lm-eval` runs lm-eval itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from served import COMPLETIONS, REAL, Served, served
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.suite("cpu")

TASKS = Path(__file__).parent / "lm_eval_task"
DOCUMENTS = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
TOLERANCE = 1e-4
"""For sums of float32 log-probabilities; the worst seen is a tenth of it."""


def task(name: str) -> dict[str, Any]:
    """A task as lm-eval reads it."""
    found: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    return found


def prompt_of(name: str, document: dict[str, Any]) -> str:
    return jinja2.Template(task(name)["doc_to_text"]).render(**document)


@dataclass(frozen=True)
class Continuation:
    """A continuation whose likelihood is asked, as ids or as text, with the number of ids before it."""

    prompt: list[int] | str
    num_context: int


def likelihoods(server: Served, asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether each of its tokens is the likeliest: one request."""
    prompts = [one.prompt for one in asked]
    body = {
        "model": server.http.get("/v1/models").json()["data"][0]["id"],
        "prompt": prompts[0] if isinstance(prompts[0], str) and len(prompts) == 1 else prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = server.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(asked)
    found = []
    for one, choice in zip(asked, choices, strict=True):
        # The token generated after the prompt is the last of the list and belongs to nobody.
        rows = slice(one.num_context, -1)
        values, tops = choice["logprobs"]["token_logprobs"][rows], choice["logprobs"]["top_logprobs"][rows]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        found.append((sum(values), is_greedy))
    return found


def generations(server: Served, prompts: Sequence[str]) -> list[str]:
    """Answers to the prompts up to the task's stop strings, in one request."""
    how = task("capitals_answer")["generation_kwargs"]
    body = {
        "prompt": list(prompts),
        "max_tokens": how["max_gen_toks"],
        "temperature": how["temperature"],
        "stop": how["until"],
        "seed": 1234,
    }
    answer = server.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in sorted(answer.json()["choices"], key=lambda choice: choice["index"])]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=vocabulary["<end>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Expectation:
    """A continuation and what transformers says of it. `text` is None for one that was found as ids."""

    token_ids: list[int]
    num_context: int
    text: str | None
    likelihood: float
    is_greedy: bool


@pytest.fixture(scope="module")
def expectations(random_model: Path) -> Iterator[list[Expectation]]:
    """Every continuation of the task, and one that the model itself would give, so that one is greedy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(random_model)

    @torch.no_grad()
    def expect(token_ids: list[int], num_context: int, text: str | None) -> Expectation:
        logprobs_TV = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), dim=-1)
        rows = range(num_context, len(token_ids))
        likelihood = sum(float(logprobs_TV[row - 1, token_ids[row]]) for row in rows)
        is_greedy = all(int(logprobs_TV[row - 1].argmax()) == token_ids[row] for row in rows)
        return Expectation(token_ids, num_context, text, likelihood, is_greedy)

    found = []
    for document in DOCUMENTS:
        context = prompt_of("capitals_choice", document)
        for choice in document["choices"]:
            text = f"{context} {choice}"
            found.append(expect(tokenizer.encode(text), len(tokenizer.encode(context)), text))
    token_ids = tokenizer.encode("The capital of nowhere is")
    num_context = len(token_ids)
    for _ in range(3):
        token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    found.append(expect(token_ids, num_context, None))
    assert {one.is_greedy for one in found} == {True, False}
    yield found
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("as_ids", [True, False], ids=["ids", "text"])
def test_likelihoods_are_those_of_transformers(
    served_random: Served, expectations: list[Expectation], as_ids: bool, batch_size: int
) -> None:
    expected = [one for one in expectations if as_ids or one.text is not None]
    asked = [
        Continuation(one.token_ids if as_ids or one.text is None else one.text, one.num_context)
        for one in expected
    ]
    found = []
    for start in range(0, len(asked), batch_size):
        found += likelihoods(served_random, asked[start : start + batch_size])
    worst = max(abs(ours[0] - one.likelihood) for ours, one in zip(found, expected, strict=True))
    print(f"{len(found)} continuations, worst difference {worst:.1e}")
    assert worst < TOLERANCE
    assert [is_greedy for _, is_greedy in found] == [one.is_greedy for one in expected]


@pytest.fixture(scope="module")
def served_random(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Iterator[Served]:
    options = (str(random_model), "--dtype", "float32", "--device", "cpu", "--threads", "1")
    with served(tmp_path_factory.mktemp("random"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def served_embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("embedded"), *REAL) as server:
        yield server


def test_the_embedded_model_chooses_the_capitals(served_embedded: Served) -> None:
    num_right = 0
    for document in DOCUMENTS:
        prompt = prompt_of("capitals_choice", document)
        ids = served_embedded.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        asked = [Continuation(f"{prompt} {choice}", len(ids)) for choice in document["choices"]]
        values = [value for value, _ in likelihoods(served_embedded, asked)]
        num_right += values.index(max(values)) == document["answer"]
    print(f"{num_right} of {len(DOCUMENTS)} right")
    assert num_right >= len(DOCUMENTS) - 1


def test_the_embedded_model_names_the_capitals(served_embedded: Served) -> None:
    prompts = [prompt_of("capitals_answer", document) for document in DOCUMENTS]
    answers = generations(served_embedded, prompts)
    print(answers)
    right = [answer.strip() == document["capital"] for answer, document in zip(answers, DOCUMENTS, strict=True)]
    assert sum(right) >= len(DOCUMENTS) - 1
