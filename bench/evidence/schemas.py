"""Two hundred random JSON schemas: whatever is drawn through their grammars is valid, by the package jsonschema."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jsonschema
from test_grammar_nightly import random_schema
from test_structured_output import RandomModel, RandomSchemas, sample

from evidence.part import Findings, Part
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.engine.llm import LLM
from lockstep.features.grammar import GrammarCompiler
from peers.markdown import table

NUM_SCHEMAS = 200
BATCH = 20
MAX_TOKENS = 1000
QUESTION = "Invent an example as JSON of this schema: "

Answers = Iterator[tuple[dict[str, Any], str]]


def collect(num_schemas: int = NUM_SCHEMAS) -> Findings:
    """Raises AssertionError or what jsonschema raises when an answer is not complete, or not valid."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}", flush=True)
    with LLM(threads=1, max_total_tokens=65536) as llm:
        ways = {
            "random scores, any schema": _checked(_by_random_scores(llm, seed, num_schemas)),
            "the engine with the embedded model, schemas of values with a longest": _checked(
                _by_the_engine(llm, seed, num_schemas)
            ),
        }
    passed = all(way["num_valid"] == num_schemas for way in ways.values())
    return {"passed": passed, "seed": seed, "num_schemas": num_schemas, "ways": ways}


def page(found: Mapping[str, Any]) -> str:
    rows = [["drawn from", "schemas", "valid", "answers' bytes", "seconds"]]
    for way, of in found["ways"].items():
        bytes_shown = f"{of['num_bytes']:,}"
        rows.append([way, str(found["num_schemas"]), str(of["num_valid"]), bytes_shown, f"{of['seconds']:.1f}"])
    return (
        f"Seed {found['seed']}. Random scores prefer to close what is open and know no language, so they reach corners "
        "of a schema that a model avoids. The engine's answers are drawn at temperature 1.5, all in one batch; its "
        "schemas are bounded, since a model that may write a string without end does.\n\n" + table(rows)
    )


def _checked(answers: Answers) -> dict[str, Any]:
    begin_s = time.perf_counter()
    num_valid = num_bytes = 0
    for schema, text in answers:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        num_valid += 1
        num_bytes += len(text.encode())
    return {
        "num_valid": num_valid,
        "num_bytes": num_bytes,
        "seconds": round(time.perf_counter() - begin_s, 1),
    }


def _by_random_scores(llm: LLM, seed: int, num_schemas: int) -> Answers:
    compiler, model, schemas = (
        GrammarCompiler(llm.tokenizer),
        RandomModel(llm.tokenizer, seed),
        RandomSchemas(seed),
    )
    for start in range(0, num_schemas, BATCH):
        batch = [schemas.root() for _ in range(min(BATCH, num_schemas - start))]
        drawn = sample(compiler, model, _grammars(batch))
        for schema, token_ids in zip(batch, drawn, strict=True):
            yield schema, llm.tokenizer.decode(token_ids, skip_special_tokens=False)


def _by_the_engine(llm: LLM, seed: int, num_schemas: int) -> Answers:
    draw = random.Random(seed)
    schemas = [random_schema(draw) for _ in range(num_schemas)]
    template = llm.tokenizer.chat_template
    assert template is not None
    chats = [
        template.render([{"role": "user", "content": QUESTION + json.dumps(schema)}]) for schema in schemas
    ]
    prompts = [llm.tokenizer.encode(chat, add_special_tokens=False) for chat in chats]
    params = [
        SamplingParams(temperature=1.5, seed=seed + number, max_tokens=MAX_TOKENS, grammar=grammar)
        for number, grammar in enumerate(_grammars(schemas))
    ]
    for schema, answer in zip(schemas, llm.generate(prompts, params), strict=True):
        assert answer.finish_reason == "stop", f"no end in sight: {schema}"
        yield schema, answer.text


def _grammars(schemas: Iterable[dict[str, Any]]) -> list[Grammar]:
    return [Grammar("json_schema", json.dumps(schema)) for schema in schemas]


PART = Part("schemas", f"{NUM_SCHEMAS} random JSON schemas", collect, page)
