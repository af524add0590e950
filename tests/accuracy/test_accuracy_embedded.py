"""The embedded model says what transformers says with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from embedded_reference import embedded_model, embedded_weights
from greedy_answers import (
    FACTS,
    NUM_SIMPLE,
    continuations,
    facts_answered,
    facts_by_reference,
    first_difference,
    is_right,
)
from transformers import LlamaForCausalLM

from lockstep.engine.llm import LLM
from lockstep.formats import embedded_model_path, open_model
from lockstep.models.loading.weights import FileWeights

pytestmark = pytest.mark.suite("cpu")

LARGEST_GAP = 0.05
LARGEST_GAP_OF_8_BITS = 0.6
"""The spread of a logit's error is about 0.1 there, that of a difference 0.15: four of them."""


@pytest.fixture(scope="module")
def reference() -> Iterator[LlamaForCausalLM]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield embedded_model()
    torch.set_num_threads(num_threads)


@pytest.mark.suite("cpu", stage="nightly", seconds=40)
def test_the_weights_are_those_that_the_gguf_package_reads() -> None:
    expected = embedded_weights()
    weights = FileWeights(open_model(embedded_model_path()))
    assert set(weights.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.load(name, torch.float32), tensor), name


@pytest.mark.parametrize(
    ("options", "largest_gap"),
    [
        pytest.param({"dtype": "float32"}, LARGEST_GAP, id="float32"),
        # By default products round what they read to 8 bits, as other engines do with such files.
        pytest.param({}, LARGEST_GAP_OF_8_BITS, id="default"),
        pytest.param({"tp": 2}, LARGEST_GAP_OF_8_BITS, id="default, two ranks"),
    ],
)
def test_greedy_text_is_that_of_transformers(
    reference: LlamaForCausalLM, options: dict[str, Any], largest_gap: float
) -> None:
    with LLM(threads=1, max_total_tokens=4096, **options) as llm:
        answers = continuations(llm)
    for prompt, answer in answers.items():
        differing = first_difference(reference, answer.prompt_token_ids, answer.token_ids)
        if differing is not None:
            print(f"{prompt!r}: {differing}")
            assert differing.gap < largest_gap


def test_simple_facts_are_right_as_often(reference: LlamaForCausalLM) -> None:
    """As it runs by default against float32. On the last four the model wavers: a rounding decides, so they are only
    shown."""
    with LLM(threads=1, max_total_tokens=4096) as llm:
        dtype, tokenizer = llm.card.dtype, llm.tokenizer
        ours = [answer.text for answer in facts_answered(llm)]
    theirs = facts_by_reference(reference, tokenizer)
    for fact, our, their in zip(FACTS, ours, theirs, strict=True):
        print(f"{fact['question']}\n  ours:         {our!r}\n  transformers: {their!r}")
    print(f"right: {num_right(ours)} of {len(FACTS)} ({dtype}), transformers {num_right(theirs)} (float32)")
    num_ours, num_theirs = num_right(ours[:NUM_SIMPLE]), num_right(theirs[:NUM_SIMPLE])
    print(f"of the {NUM_SIMPLE} simple ones {num_ours} and {num_theirs}")
    assert num_theirs >= 10, "questions that nobody can answer compare nothing"
    assert abs(num_ours - num_theirs) <= 1


def num_right(answers: list[str]) -> int:
    return sum(is_right(fact, answer) for fact, answer in zip(FACTS, answers, strict=False))
