"""Answers drawn at random through the masks always obey their grammars."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch

from lockstep.core.errors import InvalidRequest
from lockstep.core.sampling import Grammar, SamplingParams
from lockstep.core.step import SequenceStart
from lockstep.features.grammar import GrammarCompiler, failed_by_grammar
from lockstep.features.structured import StructuredOutput
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu")

EOS = 2
MAX_TOKENS = 600
LETTERS = "abcdefgh"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are small: on a busy machine, threads that wait for each other take most of the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class RandomModel:
    """Normal logits that prefer to close what is open, so that answers come to an end."""

    def __init__(self, tokenizer: Tokenizer, seed: int, *, num_padded_ids: int = 64) -> None:
        self.vocab_size = tokenizer.vocab_size + num_padded_ids
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(4 * self.vocab_size, generator=self._generator)
        texts = [tokenizer.token_bytes(i) for i in range(self.vocab_size)]
        self._taste = torch.tensor([self._closing(text) for text in texts])
        self._taste[EOS] = 8.0

    @staticmethod
    def _closing(text: bytes) -> float:
        return 5.0 * text.startswith((b'"', b"}", b"]", b")")) - 0.2 * len(text)

    def logits(self, num_rows: int) -> torch.Tensor:
        starts = torch.randint(3 * self.vocab_size, (num_rows,), generator=self._generator).tolist()
        return torch.stack([self._noise[start : start + self.vocab_size] + self._taste for start in starts])


def begin(
    grammar: Grammar | None, generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (5, 6)
) -> SequenceStart:
    return SequenceStart(
        seq_id=0,
        params=SamplingParams(grammar=grammar),
        token_ids=prompt + generated,
        num_prompt_tokens=len(prompt),
        num_cached_tokens=0,
        page_ids=(),
    )


def sample(compiler: GrammarCompiler, model: RandomModel, grammars: list[Grammar]) -> list[list[int]]:
    """One answer for each grammar, all in one batch beside an unconstrained row."""
    hook = StructuredOutput(compiler)
    for seq_id, grammar in enumerate(grammars):
        hook.start(seq_id, begin(grammar))
    free = len(grammars)
    hook.start(free, begin(None))
    answers: list[list[int]] = [[] for _ in grammars]
    running = list(range(len(grammars)))
    while running:
        rows = [*running, free]
        logits = model.logits(len(rows))
        untouched = logits[-1].clone()
        hook.mask(rows, logits)
        assert torch.equal(logits[-1], untouched)
        assert not hook.accept(free, int(untouched.argmax()))
        chosen = logits.argmax(dim=1).tolist()
        for seq_id, token_id in zip(list(running), chosen, strict=False):
            done = hook.accept(seq_id, token_id)
            if token_id != EOS:
                answers[seq_id].append(token_id)
            assert token_id != EOS or done
            assert len(answers[seq_id]) < MAX_TOKENS, f"no end in sight: {grammars[seq_id]}"
            if done:
                running.remove(seq_id)
                hook.end(seq_id)
    assert not hook.active(range(free + 1))
    return answers


class RandomSchemas:
    """JSON schemas of many shapes, at most `depth` levels deep."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def root(self) -> dict[str, Any]:
        rng = self._rng
        schema = self._object(3) if rng.random() < 0.7 else self._any(3)
        schema = dict(schema)
        schema["$defs"] = {"leaf": self._leaf(), "tree": self._tree()}
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        if depth == 0 or self._rng.random() < 0.35:
            return self._leaf()
        kinds = [self._object, self._array, self._choice, self._tuple, self._reference]
        return self._rng.choice(kinds)(depth)

    def _leaf(self) -> dict[str, Any]:
        kinds = [self._integer, self._number, self._string, self._pattern, self._constant, self._simple]
        return self._rng.choice(kinds)()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._rng.sample(
            ["name", "a b", "é", 'qu"ote', "x", "items", "$id_", "0"], self._rng.randrange(1, 5)
        )
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": [name for name in names if self._rng.random() < 0.6],
        }
        extra = self._rng.randrange(3)
        if extra:
            schema["additionalProperties"] = False if extra == 1 else self._leaf()
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._rng.randrange(3)
        return {
            "type": "array",
            "items": self._any(depth - 1),
            "minItems": low,
            "maxItems": low + self._rng.randrange(3),
        }

    def _tuple(self, depth: int) -> dict[str, Any]:
        parts = [self._any(depth - 1) for _ in range(self._rng.randrange(1, 4))]
        return {
            "type": "array",
            "prefixItems": parts,
            "items": False,
            "minItems": self._rng.randrange(len(parts) + 1),
        }

    def _choice(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._rng.randrange(1, 4))]}

    def _reference(self, depth: int) -> dict[str, Any]:
        return {"$ref": self._rng.choice(["#/$defs/leaf", "#/$defs/tree"])}

    def _tree(self) -> dict[str, Any]:
        children = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
        return {
            "type": "object",
            "properties": {"value": self._leaf(), "children": children},
            "required": ["value"],
            "additionalProperties": False,
        }

    def _integer(self) -> dict[str, Any]:
        low = self._rng.randrange(-1200, 1200)
        high = low + self._rng.randrange(1, 5000)
        lower = self._rng.choice(["minimum", "exclusiveMinimum"])
        upper = self._rng.choice(["maximum", "exclusiveMaximum"])
        return {"type": "integer", lower: low, upper: high + 1}

    def _number(self) -> dict[str, Any]:
        low = round(self._rng.uniform(-50, 50), self._rng.randrange(4))
        return {"type": "number", "minimum": low, "maximum": low + self._rng.choice([0.25, 3, 1000.5])}

    def _string(self) -> dict[str, Any]:
        low = self._rng.randrange(6)
        return {"type": "string", "minLength": low, "maxLength": low + self._rng.randrange(10)}

    def _pattern(self) -> dict[str, Any]:
        patterns = [r"^[a-z]{2,5}$", r"^\d{3}-\d{4}$", r"^(red|green) [A-F]?$", r"[^a-z]", r"^é*\.$"]
        return {"type": "string", "pattern": self._rng.choice(patterns)}

    def _constant(self) -> dict[str, Any]:
        values: list[Any] = ["on", "off ", 3, -1.5, None, True, [1, "a"], {"k": "v"}, 'q"\\']
        if self._rng.random() < 0.4:
            return {"const": self._rng.choice(values)}
        return {"enum": self._rng.sample(values, self._rng.randrange(1, 5))}

    def _simple(self) -> dict[str, Any]:
        return {"type": self._rng.choice(["string", "boolean", "null", "integer", ["number", "null"]])}


def test_two_hundred_random_schemas(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    seed = 2024
    print(f"seed {seed}")
    schemas = RandomSchemas(seed)
    model = RandomModel(embedded, seed)
    kinds: set[str] = set()
    for _ in range(10):
        batch = [schemas.root() for _ in range(20)]
        answers = sample(compiler, model, [Grammar("json_schema", json.dumps(schema)) for schema in batch])
        for schema, answer in zip(batch, answers, strict=True):
            value = json.loads(embedded.decode(answer, skip_special_tokens=False))
            jsonschema.Draft202012Validator(schema).validate(value)
            kinds.add(type(value).__name__)
    assert {"dict", "list", "str"} <= kinds


def test_json_objects(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    for answer in sample(compiler, RandomModel(embedded, 3), [Grammar("json_object")] * 20):
        assert isinstance(json.loads(embedded.decode(answer)), dict)


PATTERNS = (
    r"[a-f]{3}(-[0-9]{2})*",
    r"(\+\d{1,3} )?\d{4,8}",
    r"(yes|no|may be)[.!]?",
    r'"([^"\\]|\\.){0,12}"',
    r"(?i)abc[xyz]{2}",
    r"é{2}[^a-z\s]{1,3}🙂?",
    r"",
    r"^anchored$",
)


def test_regular_expressions(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    model = RandomModel(embedded, 4)
    grammars = [Grammar("regex", pattern) for pattern in PATTERNS for _ in range(4)]
    for grammar, answer in zip(grammars, sample(compiler, model, grammars), strict=True):
        text = embedded.decode(answer, skip_special_tokens=False)
        assert re.fullmatch(grammar.source, text), (grammar.source, text)


ARITHMETIC = """
root  ::= sum
sum   ::= term (" + " term | " - " term){0,2}
term  ::= factor ("*" factor)?
factor ::= number | "(" number (" + " number)? ")"
number ::= [1-9] [0-9]{0,2}
"""
ARITHMETIC_LARK = """
start: term ((" + " | " - ") term)~0..2
term: factor ("*" factor)?
factor: NUMBER | "(" NUMBER (" + " NUMBER)? ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def eat_sum(text: str) -> str:
    """What is left after a sum; a reader of the grammar above that shares no code with it."""
    text = eat_product(text)
    for _ in range(2):
        if not text.startswith((" + ", " - ")):
            break
        text = eat_product(text[3:])
    return text


def eat_product(text: str) -> str:
    text = eat_factor(text)
    return eat_factor(text[1:]) if text.startswith("*") else text


def eat_factor(text: str) -> str:
    if not text.startswith("("):
        return eat_number(text)
    text = eat_number(text[1:])
    if text.startswith(" + "):
        text = eat_number(text[3:])
    assert text.startswith(")"), text
    return text[1:]


def eat_number(text: str) -> str:
    digits = len(text) - len(text.lstrip("0123456789"))
    assert 1 <= digits <= 3 and text[0] != "0", text
    return text[digits:]


@pytest.mark.parametrize("source", [ARITHMETIC, ARITHMETIC_LARK])
def test_ebnf(compiler: GrammarCompiler, embedded: Tokenizer, source: str) -> None:
    answers = sample(compiler, RandomModel(embedded, 5), [Grammar("ebnf", source)] * 30)
    texts = {embedded.decode(answer) for answer in answers}
    assert len(texts) > 5
    for text in texts:
        assert eat_sum(text) == "", text


def test_sentencepiece_models(sentencepiece: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["the cat", "é"]}}, "required": ["name"]}
    grammar = Grammar("json_schema", json.dumps({**schema, "additionalProperties": False}))
    answers = sample(GrammarCompiler(sentencepiece), RandomModel(sentencepiece, 6), [grammar] * 10)
    texts = {sentencepiece.decode([1, *answer]) for answer in answers}
    assert texts == {'{"name": "the cat"}', '{"name": "é"}'}


def test_preempted_sequences_go_on_where_they_were(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    seed = 7
    grammar = Grammar("json_schema", json.dumps(RandomSchemas(seed).root()))
    model = RandomModel(embedded, seed)
    (answer,) = sample(compiler, model, [grammar])
    assert len(answer) > 5
    whole, resumed = StructuredOutput(compiler), StructuredOutput(compiler)
    whole.start(1, begin(grammar))
    for position, token_id in enumerate(answer):
        resumed.start(1, begin(grammar, generated=tuple(answer[:position])))
        expected, found = torch.zeros(1, model.vocab_size), torch.zeros(1, model.vocab_size)
        whole.mask([1], expected)
        resumed.mask([1], found)
        assert torch.equal(expected, found)
        assert expected[0, token_id] == 0
        assert whole.accept(1, token_id) == resumed.accept(1, token_id)
        resumed.end(1)
    assert not resumed.active([1])


@pytest.mark.parametrize("vocab_size", [49152, 49155, 49999, 3000])
def test_ids_past_the_vocabulary_are_forbidden(compiler: GrammarCompiler, vocab_size: int) -> None:
    hook = StructuredOutput(compiler)
    hook.start(1, begin(Grammar("regex", "[a-z]*")))
    logits = torch.zeros(2, vocab_size)
    hook.mask([9, 1], logits)
    assert torch.isfinite(logits[0]).all()
    assert logits[1, EOS] == 0
    assert torch.isfinite(logits[1]).sum() > 10
    assert not torch.isfinite(logits[1, 49152:]).any()


def test_half_precision_logits_are_masked_in_place(compiler: GrammarCompiler) -> None:
    hook = StructuredOutput(compiler)
    hook.start(1, begin(Grammar("regex", "")))
    logits = torch.ones(1, 49152, dtype=torch.bfloat16)
    hook.mask([1], logits)
    assert torch.isfinite(logits).sum() == 1
    assert logits[0, EOS] == 1


def test_a_grammar_that_fails_after_a_token_ends_its_sequence(embedded: Tokenizer) -> None:
    """An allowed token may leave the grammar broken; that must not pass for a complete answer."""
    hook = StructuredOutput(GrammarCompiler(embedded))
    hook.start(1, begin(Grammar("regex", r"[a-z ]{200}(\w{1,200}){1,200}")))
    (letter,) = embedded.encode("a", add_special_tokens=False)
    with pytest.raises(InvalidRequest, match="cannot go on after token") as refusal:
        for _ in range(400):
            logits = torch.zeros(1, 49152)
            hook.mask([1], logits)
            assert not hook.accept(1, letter if torch.isfinite(logits[0, letter]) else EOS)
    assert failed_by_grammar(str(refusal.value))
    assert not failed_by_grammar("the model's scores are not numbers")


def test_bad_sequences_fail_alone(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    hook = StructuredOutput(compiler)
    with pytest.raises(InvalidRequest):
        hook.start(1, begin(Grammar("regex", "[")))
    with pytest.raises(InvalidRequest, match="cannot go on after token"):
        hook.start(2, begin(Grammar("regex", "ab"), generated=(embedded.encode("x")[0],)))
    assert not hook.active([1, 2])
    hook.start(3, begin(Grammar("regex", "ab")))
    with pytest.raises(InvalidRequest, match="cannot go on after token"):
        hook.accept(3, embedded.encode("x")[0])
    hook.end(3)
    hook.end(3)
    assert not hook.accept(3, EOS)
