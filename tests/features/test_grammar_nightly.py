"""Random JSON schemas and values: a grammar accepts what another library calls valid, and nothing else."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from lockstep.core.sampling import Grammar
from lockstep.features.grammar import GrammarCompiler
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu", stage="nightly", seconds=60)

NUM_SCHEMAS = 10_000
VALUES_EACH = 10
WORDS = ("a", "bo", "cleo", "", "Zoë")

Schema = dict[str, Any]


def random_schema(draw: random.Random, depth: int = 3) -> Schema:
    """Of the kinds that mean the same to everyone: objects in the order of their properties, no floats."""
    plain = ("boolean", "null", "integer", "string", "enum")
    kind = draw.choice((*plain, "array", "object", "anyOf") if depth else plain)
    if kind == "integer":
        low = draw.randint(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 150)}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(0, 4)}
    if kind == "enum":
        return {"enum": draw.sample([*WORDS, 1, 23, True, None], draw.randint(1, 4))}
    if kind == "array":
        low = draw.randint(0, 2)
        items = random_schema(draw, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + draw.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = draw.sample(("x", "y", "name", "a b"), draw.randint(1, 4))
        properties = {name: random_schema(draw, depth - 1) for name in names}
        required = [name for name in names if draw.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def random_value(draw: random.Random, schema: Schema) -> Any:
    """One that mostly fits: now and then a part of it is something else."""
    if draw.random() < 0.05:
        return draw.choice([None, True, 7, -300, "long words", [], {}, [1], {"x": 1}])
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "anyOf" in schema:
        return random_value(draw, draw.choice(schema["anyOf"]))
    kinds: dict[str, Callable[[], Any]] = {
        "boolean": lambda: draw.random() < 0.5,
        "null": lambda: None,
        "integer": lambda: draw.randint(schema["minimum"] - 3, schema["maximum"] + 3),
        "string": lambda: draw.choice(WORDS),
        "array": lambda: [random_value(draw, schema["items"]) for _ in range(draw.randint(0, 4))],
        "object": lambda: {
            name: random_value(draw, each)
            for name, each in schema["properties"].items()
            if name in schema["required"] or draw.random() < 0.5
        },
    }
    return kinds[schema["type"]]()


def test_random_schemas_against_another_library(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    token_of = {embedded.token_bytes(token_id): token_id for token_id in range(embedded.vocab_size)}
    num_valid = 0
    for _ in range(NUM_SCHEMAS):
        schema = random_schema(draw)
        grammar = Grammar("json_schema", json.dumps(schema))
        judge = jsonschema.Draft202012Validator(schema)
        for _ in range(VALUES_EACH):
            value = random_value(draw, schema)
            state = compiler.start(grammar)
            text = json.dumps(value, ensure_ascii=False)
            accepted = all(state.accept(token_of[bytes([byte])]) for byte in text.encode()) and state.may_end
            num_valid += accepted
            assert accepted == judge.is_valid(value), f"{json.dumps(schema)}\n{text}"
    assert NUM_SCHEMAS < num_valid < NUM_SCHEMAS * VALUES_EACH - NUM_SCHEMAS
