"""Structured output through `LLM`: every answer fits, also after preemption and beside free answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tiny_llm import make_tiny, open_tiny

from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.llm import LLM

pytestmark = pytest.mark.suite("cpu")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "fish"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]"
SUM = 'root ::= term ("+" term){1,4}\nterm ::= [0-9]{1,3} | "(" root ")"'
PEOPLE = ("Ada", "Alan", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Tony")
PROMPTS = [f"A record about {person}, whose pets are well known: " for person in PEOPLE]
PARAMS = SamplingParams(
    temperature=1.0, max_tokens=80, grammar=Grammar("json_schema", json.dumps(SCHEMA)), logprobs=0
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(threads=1, max_total_tokens=4096) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are the same whoever shares its steps: bytes at random, but for the grammar."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory, max_position_embeddings=512)
    return directory


def seeded(params: SamplingParams) -> list[SamplingParams]:
    return [replace(params, seed=at) for at in range(len(PROMPTS))]


def test_json_schemas_hold(llm: LLM) -> None:
    for answer in llm.generate(PROMPTS, seeded(PARAMS)):
        assert answer.finish_reason == "stop", answer.text
        jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_any_json_object(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=120, grammar=Grammar("json_object"))
    answer = llm.generate(['The configuration in JSON, {"debug": true}, and the default one: '], params)[0]
    assert answer.finish_reason == "stop" and isinstance(json.loads(answer.text), dict)


def test_regular_expressions_hold(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=30, grammar=Grammar("regex", DATE))
    answers = llm.generate(PROMPTS, seeded(params))
    assert all(re.fullmatch(DATE, answer.text) and answer.finish_reason == "stop" for answer in answers)
    assert len({answer.text for answer in answers}) > 1


def test_grammars_hold(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=200, grammar=Grammar("ebnf", SUM))
    for answer in llm.generate(PROMPTS[:4], seeded(params)[:4]):
        if answer.finish_reason == "stop":
            # A sum of literals, which nothing but this expression parser needs to understand.
            assert "+" in answer.text and set(answer.text) <= set("0123456789+()")
            compile(re.sub(r"\b0+(?=[0-9])", "", answer.text), "sum", "eval")
        else:
            assert answer.finish_reason == "length" and len(answer.token_ids) == 200


def test_constrained_and_free_answers_share_steps(tiny: Path) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=20, logprobs=0)
    kinds = [free, replace(PARAMS, seed=1), free, replace(PARAMS, seed=3)]
    with open_tiny(tiny) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, kinds, strict=False)]
        together = llm.generate(PROMPTS[:4], kinds)
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_preemption_resumes_in_the_middle_of_a_grammar(tiny: Path) -> None:
    with open_tiny(tiny) as large:
        expected = large.generate(PROMPTS, seeded(PARAMS))
    with open_tiny(tiny, max_total_tokens=512) as small:
        found = small.generate(PROMPTS, seeded(PARAMS))
        print(f"{small.stats().num_preemptions} preemptions")
        assert small.stats().num_preemptions > 0
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    for answer in found:
        print(repr(answer.text))


def test_stop_strings_and_limits_still_end_a_constrained_answer(llm: LLM) -> None:
    stopped = llm.generate(PROMPTS[:1], replace(PARAMS, seed=0, stop=('"age"',)))[0]
    assert stopped.finish_reason == "stop" and stopped.text.endswith(", ")
    cut = llm.generate(PROMPTS[:1], replace(PARAMS, seed=0, max_tokens=5))[0]
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5


def test_the_distribution_reported_is_the_unconstrained_one(llm: LLM) -> None:
    free = llm.generate(PROMPTS[:1], SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))[0]
    bound = llm.generate(PROMPTS[:1], replace(PARAMS, temperature=0.0, max_tokens=1, logprobs=20))[0]
    assert bound.text.startswith("{") and not free.text.startswith("{")
    assert [value for _, value in bound.logprobs[0].top] == pytest.approx(
        [value for _, value in free.logprobs[0].top], abs=1e-4
    )
