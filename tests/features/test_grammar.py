"""Grammars: what they allow, what they refuse, and how broken ones are reported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.core.errors import IntegrityError, InvalidRequest
from lockstep.core.sampling import Grammar
from lockstep.features.grammar import GrammarCompiler, GrammarState
from lockstep.features.guidance_vocabulary import GuidanceVocabulary
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed_ids(state: GrammarState, num_words: int) -> set[int]:
    row = np.full(num_words, -1, dtype=np.int32)
    state.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def fits(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """True when the grammar accepts exactly this text, cut in the most tokens possible (bytes)."""
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    state = compiler.start(grammar)
    return all(state.accept(table[bytes([byte])]) for byte in text.encode()) and state.may_end


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Bo", "age": 7}', True),
        ('{"name": "Bo é \\n 你", "age": 120}', True),
        ('{"name": "Bo", "age": 121}', False),
        ('{"name": "Bo"}', False),
        ('{"name": "Bo", "age": 7, "x": 1}', False),
        ('{"name":"Bo","age":7}', False),
        ('{ "name": "Bo", "age": 7}', False),
        ('{"name": "Bo",  "age": 7}', False),
    ],
)
def test_json_schema_in_one_style(
    compiler: GrammarCompiler, embedded: Tokenizer, text: str, expected: bool
) -> None:
    assert fits(compiler, embedded, schema(PERSON), text) is expected
    flexible = schema({**PERSON, "x-guidance": {"whitespace_flexible": True}})
    assert fits(compiler, embedded, flexible, text) is expected


@pytest.mark.parametrize("source", ["(a{1000}){1000}", r"(\w{1,200}){1,200}", r"[a-z]{9}(\w{1,200}){1,200}"])
def test_what_outgrows_the_limits_is_known_before_it_runs(compiler: GrammarCompiler, source: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be used: lexer error") as refusal:
        compiler.validate(Grammar("regex", source))
    assert refusal.value.code == "invalid_grammar"


def test_overlapping_one_of_is_any_of(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    overlapping = schema({"oneOf": [{"type": "number"}, {"type": "integer"}]})
    assert fits(compiler, embedded, overlapping, "1") and fits(compiler, embedded, overlapping, "1.5")
    tagged = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "x": {"type": of}},
            "required": ["kind", "x"],
        }
        for kind, of in (("cat", "integer"), ("dog", "string"))
    ]
    union = schema({"oneOf": tagged, "discriminator": {"propertyName": "kind"}})
    assert fits(compiler, embedded, union, '{"kind": "cat", "x": 1}')
    assert not fits(compiler, embedded, union, '{"kind": "dog", "x": 1}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", True),
        ('{"a": [1, {"b": null}], "c": -1.5e3}', True),
        ("[]", False),
        ("1", False),
        ('{"a"}', False),
    ],
)
def test_json_object_is_any_object(
    compiler: GrammarCompiler, embedded: Tokenizer, text: str, expected: bool
) -> None:
    assert fits(compiler, embedded, Grammar("json_object"), text) is expected


def test_a_schema_of_true_is_any_value(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    assert fits(compiler, embedded, schema(True), '[1, "a"]')


ESCAPES = r'root ::= "\u00e9" "\x41\u0042" [\u00e0-\u00ff\x30-9]+ "\\u0041" "\"" [^"\\\]]*'


@pytest.mark.parametrize(
    ("source", "yes", "no"),
    [
        ('root ::= "a" | b\nb ::= [0-9]{2,3} "."? # end', ["a", "12", "123."], ["1", "1234", "ab"]),
        ('root ::= pair ("," pair)*\npair ::= [a-z]+ "=" ("1" | "2")', ["a=1", "b=2,cd=1"], ["a=1,", "=1"]),
        (ESCAPES, ['éABé\\u0041"', 'éABÿ7\\u0041"x'], ['éABz\\u0041"', 'éABé\\u0041"]']),
        ('start: "a" /[0-9]+/', ["a1"], ["a", "1"]),
        ('// a Lark grammar\nstart: word+\nword: /[a-z]/ "!"', ["a!b!"], ["a"]),
    ],
)
def test_ebnf_in_gbnf_and_lark(
    compiler: GrammarCompiler, embedded: Tokenizer, source: str, yes: list[str], no: list[str]
) -> None:
    grammar = Grammar("ebnf", source)
    assert all(fits(compiler, embedded, grammar, text) for text in yes)
    assert not any(fits(compiler, embedded, grammar, text) for text in no)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "obj'), "not JSON"),
        (Grammar("json_schema", ""), "not JSON"),
        (Grammar("json_schema", "[1]"), r"is an object, not \[1\]"),
        (Grammar("json_schema", "false"), "is an object, not false"),
        (schema({"type": "objekt"}), "JSON schema cannot be used: .*objekt"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "#/$defs/missing"}), "missing"),
        (schema({"$ref": "http://example.com/schema.json"}), "example.com"),
        (schema({"type": "string", "pattern": "["}), "unclosed character class"),
        (schema({"type": "integer", "minimum": 3, "maximum": 1}), "minimum"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "matches no text"),
        (Grammar("regex", "[a"), "regular expression cannot be used: unclosed character class"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("ebnf", 'root ::= "a'), "EBNF grammar cannot be read.*Unexpected end"),
        (Grammar("ebnf", "root ::= missing"), "missing"),
        (Grammar("ebnf", 'word ::= "a"'), "root"),
        (Grammar("ebnf", r'root ::= "\ud800"'), "not a character"),
        (Grammar("ebnf", "root ::= root"), "matches no text"),
        (Grammar("ebnf", "start: /[a/"), "unclosed character class"),
        (Grammar("ebnf", ""), "root"),
        (Grammar("ebnf", "root ::= " + "(" * 100_000), "EBNF grammar cannot be read"),
    ],
)
def test_broken_grammars_are_invalid_requests(
    compiler: GrammarCompiler, grammar: Grammar, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        compiler.validate(grammar)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InvalidRequest):
        compiler.start(grammar)


def test_a_grammar_that_is_too_large_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match=r"EBNF grammar cannot be used: .*Too many items"):
        compiler.validate(Grammar("ebnf", "root ::= " + "[a-z]? " * 3000))


def test_a_grammar_may_outgrow_its_limits_later(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    ambiguous = Grammar("ebnf", "root ::= (a | b)*\na ::= [a-z]+ b?\nb ::= [a-z]+ a?")
    state = compiler.start(ambiguous)
    word = embedded.encode("information")[0]
    assert not all(state.accept(word) for _ in range(100))
    assert "max is" in state.error
    assert compiler.start(ambiguous).error == ""


def test_masks_hold_exactly_what_may_follow(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    num_words = embedded.vocab_size // 32
    state = compiler.start(Grammar("regex", "(yes|yellow|no) *"))
    texts = {embedded.token_bytes(i).decode() for i in allowed_ids(state, num_words)}
    assert texts == {"y", "ye", "yes", "yel", "yell", "yellow", "n", "no"} & {
        embedded.token_bytes(i).decode(errors="replace") for i in range(embedded.vocab_size)
    }
    state.accept(embedded.encode("no")[0])
    assert state.may_end
    assert not state.complete
    ids = allowed_ids(state, num_words)
    assert 2 in ids
    assert not (embedded.special_token_ids - {2}) & ids
    assert {embedded.token_bytes(i).strip() for i in ids - {2}} == {b""}


def test_masks_of_any_width(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    num_words = embedded.vocab_size // 32
    state = compiler.start(Grammar("regex", "[a-z]*"))
    ids = allowed_ids(state, num_words)
    assert allowed_ids(state, num_words + 7) == ids
    assert allowed_ids(state, 100) == {i for i in ids if i < 3200}


def test_completion_is_known_without_an_end_token(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    state = compiler.start(Grammar("regex", "ab"))
    for token_id in embedded.encode("ab"):
        assert not state.complete
        assert state.accept(token_id)
    assert state.complete
    assert allowed_ids(state, embedded.vocab_size // 32) == {2}
    assert state.accept(2)
    assert state.error == ""


def test_a_forbidden_token_is_an_error_that_stays(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    state = compiler.start(Grammar("regex", "ab"))
    assert not state.accept(embedded.encode("x")[0])
    assert "satisfy the grammar" in state.error
    assert not state.accept(embedded.encode("ab")[0])
    assert allowed_ids(state, embedded.vocab_size // 32) == {2}


def test_rollback_forgets(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    state = compiler.start(Grammar("regex", "[ab]{3}"))
    before = allowed_ids(state, embedded.vocab_size // 32)
    letters = [embedded.encode(letter)[0] for letter in "aba"]
    for letter in letters:
        assert state.accept(letter)
    assert state.complete
    state.rollback(3)
    assert not state.complete
    assert allowed_ids(state, embedded.vocab_size // 32) == before
    with pytest.raises(IntegrityError):
        state.rollback(1)


def test_states_of_one_grammar_are_apart(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    one, other = compiler.start(Grammar("regex", "ab?")), compiler.start(Grammar("regex", "ab?"))
    one.accept(embedded.encode("a")[0])
    assert one.may_end
    assert not other.may_end


def test_several_end_tokens(sentencepiece: Tokenizer) -> None:
    state = GrammarCompiler(sentencepiece).start(Grammar("regex", ""))
    assert allowed_ids(state, 20) == set(sentencepiece.eos_token_ids)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "maximum": 2**64},
        {"const": "\ud800"},
        {"type": "integer", "multipleOf": 1000033},
        {"allOf": [{"multipleOf": prime} for prime in (97, 101, 103)]},
    ],
)
def test_schemas_that_no_grammar_holds(schema: dict[str, Any], compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="JSON schema"):
        compiler.validate(Grammar("json_schema", json.dumps(schema)))


def test_divisors_that_are_usual(compiler: GrammarCompiler) -> None:
    usual = {
        str(at): {"type": "number", "multipleOf": each} for at, each in enumerate((0.01, 5, 100, 1e6, 25, 60))
    }
    compiler.validate(Grammar("json_schema", json.dumps({"type": "object", "properties": usual})))


def test_a_model_without_end_token_is_refused(embedded: Tokenizer) -> None:
    endless = Tokenizer(embedded._backend, embedded._vocabulary)
    with pytest.raises(InvalidRequest, match="end token"):
        GrammarCompiler(endless).validate(Grammar("regex", "a"))


def mid_texts() -> Iterator[str]:
    yield from ('{"name": "', "the cat", " the", "  x", "é\n🙂", "", '": "', "<s>")


def test_forced_text_is_spelled_exactly(embedded: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (embedded, sentencepiece):
        vocabulary = GuidanceVocabulary(tokenizer)
        for text in mid_texts():
            spelled = b"".join(tokenizer.token_bytes(i) for i in vocabulary(text))
            assert spelled == text.encode(), repr(text)


def test_forced_text_is_cut_as_the_model_would(embedded: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert GuidanceVocabulary(embedded)('"name": ') == embedded.encode('"name": ')
    pieces = [sentencepiece.token_text(i) for i in GuidanceVocabulary(sentencepiece)('{"name: "')]
    assert pieces == ['{"', "name", ': "']


def test_texts_that_a_tokenizer_normalises_are_still_spelled(embedded: Tokenizer) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers

    backend = Backend.from_str(embedded._backend.to_str())
    backend.normalizer = normalizers.NFC()
    composing = Tokenizer(backend, embedded._vocabulary, eos_token_ids=(2,))
    text = "cafe\u0301 the"
    assert composing.decode(composing.encode(text)) != text
    vocabulary = GuidanceVocabulary(composing)
    assert b"".join(composing.token_bytes(i) for i in vocabulary(text)) == text.encode()
    state = GrammarCompiler(composing).start(Grammar("regex", text))
    while not state.complete:
        assert state.accept(min(allowed_ids(state, embedded.vocab_size // 32)))
    assert state.error == ""


DOCUMENTED = re.search(
    r"## Structured output(.*?)\n## ", (Path(__file__).parents[2] / "docs" / "http.md").read_text(), re.DOTALL
)
BASE: dict[str, object] = {"properties": {"a": {"type": "string"}}}
SAMPLES: dict[str, dict[str, object]] = {
    "type": {"type": "string"},
    "const": {"const": 1},
    "enum": {"enum": [1]},
    "anyOf": {"anyOf": [{"type": "null"}]},
    "oneOf": {"oneOf": [{"type": "null"}]},
    "allOf": {"allOf": [{"type": "string"}, {"maxLength": 3}]},
    "$ref": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}},
    "$defs": {"$defs": {}},
    "definitions": {"$ref": "#/definitions/x", "definitions": {"x": {"type": "null"}}},
    "properties": BASE,
    "required": BASE | {"required": ["a"]},
    "additionalProperties": BASE | {"additionalProperties": False},
    "patternProperties": {"patternProperties": {"^x": {"type": "null"}}},
    "minProperties": {"minProperties": 1},
    "maxProperties": {"maxProperties": 3},
    "items": {"items": {"type": "null"}},
    "prefixItems": {"prefixItems": [{"type": "null"}]},
    "minItems": {"minItems": 1},
    "maxItems": {"maxItems": 2},
    "minimum": {"minimum": 1},
    "maximum": {"maximum": 1},
    "exclusiveMinimum": {"exclusiveMinimum": 1},
    "exclusiveMaximum": {"exclusiveMaximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "minLength": {"minLength": 1},
    "maxLength": {"maxLength": 1},
    "pattern": {"pattern": "^a$"},
    **{
        name: {"type": "string", "format": name}
        for name in (
            *("date", "time", "date-time", "duration", "email"),
            *("hostname", "ipv4", "ipv6", "uuid", "uri"),
        )
    },
}


def test_documented_keywords_are_those_that_work(compiler: GrammarCompiler) -> None:
    assert DOCUMENTED is not None
    listed = [line for line in DOCUMENTED[1].splitlines() if line.startswith(("- ", "  "))]
    assert set(re.findall(r"`([^`]+)`", " ".join(listed))) == {*SAMPLES, "format"}
    for sample in SAMPLES.values():
        compiler.validate(schema(sample))


@pytest.mark.parametrize(
    "keyword", ["not", "if", "contains", "uniqueItems", "propertyNames", "dependentRequired", "$dynamicRef"]
)
def test_other_keywords_are_refused_by_name(compiler: GrammarCompiler, keyword: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(keyword)):
        compiler.validate(schema({"type": "array", keyword: True}))
