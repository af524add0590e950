"""Readers of tool calls give the same whatever the pieces, lose nothing, and match what grammars allow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError
from lockstep.server.tools.forced import (
    NamedCallReader,
    RequiredCallsReader,
    named_call_grammar,
    required_calls_grammar,
)
from lockstep.server.tools.hermes import HermesReader
from lockstep.server.tools.llama3_json import Llama3JsonReader
from lockstep.server.tools.reader import (
    AnswerReader,
    CallArguments,
    CallStart,
    FirstCallReader,
    Text,
    TextReader,
)
from lockstep.server.tools.registry import choose_reader

pytestmark = pytest.mark.suite("cpu")

NAMES = frozenset({"add", "sub"})


def read(reader: AnswerReader, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """All text, and all calls as (name, arguments)."""
    text, calls = "", []
    for piece in [found for part in pieces for found in reader.feed(part)] + list(reader.finish()):
        if isinstance(piece, Text):
            text += piece.text
        elif isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, CallArguments)
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


ADD = '{"name": "add", "arguments": {"x": "</tool" }}'
HERMES = [
    ("plain text", "plain text", []),
    (f"<tool_call>{ADD}</tool_call>", "", [("add", '{"x": "</tool"}')]),
    (f"Hm. <tool_call>\n{ADD}\n</tool_call>\nDone", "Hm. Done", [("add", '{"x": "</tool"}')]),
    (
        f'<tool_call>{ADD}</tool_call>\n<tool_call>{{"name": "sub"}}</tool_call>',
        "",
        [("add", '{"x": "</tool"}'), ("sub", "{}")],
    ),
    (f"<tool_call>{ADD}", "", [("add", '{"x": "</tool"}')]),
    ("<tool_call>{broken</tool_call> on", "<tool_call>{broken</tool_call> on", []),
    ('<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ('<tool_call>{"name": ["add"]}</tool_call>', '<tool_call>{"name": ["add"]}</tool_call>', []),
    ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    *(
        (f'<tool_call>{{"name": "add", "arguments": {bad}}}</tool_call>',) * 2 + ([],)
        for bad in ("5", "[1]", '{"x": "\\ud83d"}', '"\\ud83d"')
    ),
    ("a <tool_ca", "a <tool_ca", []),
    ("1 < 2 <<tool_call", "1 < 2 <<tool_call", []),
    ("", "", []),
]
LLAMA = [
    ("plain {text}", "plain {text}", []),
    ('{"name": "add", "parameters": {"x": 1}}', "", [("add", '{"x": 1}')]),
    ('<|python_tag|>{"name": "add", "parameters": {}}', "", [("add", "{}")]),
    (
        ' {"name": "add", "parameters": {}}; {"name": "sub", "arguments": {"é": 1}}',
        "",
        [("add", "{}"), ("sub", '{"é": 1}')],
    ),
    ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ('{"name": "add", "parameters": {}} trailing', '{"name": "add", "parameters": {}} trailing', []),
    ("{broken", "{broken", []),
    ('{"name": {"add": 1}, "parameters": {}}', '{"name": {"add": 1}, "parameters": {}}', []),
    ("<|pyth", "<|pyth", []),
]
REQUIRED = [
    ('[{"name":"add","arguments":{"x":"}{\\""}}]', "", [("add", '{"x":"}{\\""}')]),
    (
        '[ {"name" : "add" , "arguments" : {} } , {"name":"sub","arguments":{"a":[{}]}} ]',
        "",
        [("add", "{}"), ("sub", '{"a":[{}]}')],
    ),
    ('[{"name":"add","arguments":{"x', "", [("add", '{"x')]),
    ('[{"name":"ad', '[{"name":"ad', []),
]
CASES: list[tuple[Callable[[], AnswerReader], str, str, list[tuple[str, str]]]] = [
    *((lambda: HermesReader(NAMES), *case) for case in HERMES),
    *((lambda: Llama3JsonReader(NAMES), *case) for case in LLAMA),
    *((RequiredCallsReader, *case) for case in REQUIRED),
    (lambda: NamedCallReader("add"), '{"x": 1}', "", [("add", '{"x": 1}')]),
    (TextReader, f"<tool_call>{ADD}</tool_call>", f"<tool_call>{ADD}</tool_call>", []),
]


@pytest.mark.parametrize(("make", "answer", "text", "calls"), CASES, ids=[case[1][:40] for case in CASES])
@settings(max_examples=25, deadline=None, print_blob=True)
@given(data=st.data())
def test_reader_whatever_the_pieces(
    make: Callable[[], AnswerReader], answer: str, text: str, calls: list[tuple[str, str]], data: st.DataObject
) -> None:
    assert read(make(), [answer]) == (text, calls)
    assert read(make(), list(answer)) == (text, calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=5)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(make(), pieces) == (text, calls)


@settings(max_examples=200, deadline=None, print_blob=True)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", "<", "a", '"name"', " ", "\n"])))
def test_hermes_loses_nothing_that_is_no_call(parts: list[str]) -> None:
    assert read(HermesReader(NAMES), parts) == ("".join(parts), [])


@pytest.mark.parametrize("reader", [HermesReader(NAMES), Llama3JsonReader(NAMES)])
def test_what_is_nested_too_deeply_is_text(reader: AnswerReader) -> None:
    answer = '<tool_call>{"name": "add", "parameters": ' + "[" * 100_000
    answer = answer.removeprefix("<tool_call>") if isinstance(reader, Llama3JsonReader) else answer
    assert read(reader, [answer]) == (answer, [])


def test_text_streams_before_a_call() -> None:
    reader = HermesReader(NAMES)
    assert list(reader.feed("one two <to")) == [Text("one two ")]
    assert list(reader.feed("rn")) == [Text("<torn")]


def test_choice_of_reader() -> None:
    assert choose_reader(None, "... <tool_call> ...") is HermesReader
    assert choose_reader(None, '{"name": function name, "parameters": dictionary}') is Llama3JsonReader
    assert choose_reader("auto", None) is HermesReader
    assert choose_reader("llama3_json", "<tool_call>") is Llama3JsonReader
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        choose_reader("hermse", None)


@dataclass(frozen=True)
class Function:
    name: str
    parameters: dict[str, Any] | None


TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "kind": {"enum": ["$ref", "#/x"]}},
    "required": ["root"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
SELF = {"type": "object", "properties": {"again": {"$ref": "#"}}, "additionalProperties": False}
FUNCTIONS = [Function("tree", TREE), Function("self", SELF), Function("bare", None)]


def accepts(source: str, text: str) -> bool:
    """Whether the grammar engine lets the whole text through and may stop there."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(source)
    )
    assert not matcher.get_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


ANSWERS: list[tuple[list[dict[str, Any]], bool]] = [
    ([{"name": "tree", "arguments": {"root": {"value": 1, "next": {"value": 2}}, "kind": "#/x"}}], True),
    ([{"name": "self", "arguments": {"again": {"again": {}}}}], True),
    ([{"name": "bare", "arguments": {"anything": [1]}}, {"name": "self", "arguments": {}}], True),
    ([{"name": "tree", "arguments": {"root": {"value": 1, "next": {"value": "2"}}}}], False),
    ([{"name": "self", "arguments": {"again": {"agian": {}}}}], False),
    ([{"name": "self", "arguments": {"root": {"value": 1}}}], False),
    ([{"name": "other", "arguments": {}}], False),
    ([], False),
]


@pytest.mark.parametrize(("answer", "allowed"), ANSWERS)
def test_required_grammar_is_the_tools_schemas(answer: list[dict[str, Any]], allowed: bool) -> None:
    grammar = required_calls_grammar(FUNCTIONS, parallel=True)
    schema = json.loads(grammar.source)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(answer) is allowed
    assert accepts(grammar.source, json.dumps(answer)) is allowed
    if allowed:
        expected = [(call["name"], json.dumps(call["arguments"])) for call in answer]
        assert read(RequiredCallsReader(), list(json.dumps(answer))) == ("", expected)


def test_no_parallel_calls_means_one() -> None:
    one = [{"name": "bare", "arguments": {}}]
    source = required_calls_grammar(FUNCTIONS, parallel=False).source
    assert accepts(source, json.dumps(one))
    assert not accepts(source, json.dumps(one * 2))


def test_named_grammar_is_the_parameters() -> None:
    assert json.loads(named_call_grammar(FUNCTIONS[0]).source) == TREE
    assert accepts(named_call_grammar(FUNCTIONS[2]).source, '{"x": 1}')
    assert not accepts(named_call_grammar(FUNCTIONS[2]).source, "[1]")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_one_call_at_a_time(size: int) -> None:
    """`parallel_tool_calls: false` where no call is forced: calls after the first are left out, text is not."""
    answer = f'Hm. <tool_call>{ADD}</tool_call> And <tool_call>{{"name": "sub"}}</tool_call> Done'
    parts = [answer[at : at + size] for at in range(0, len(answer), size)]
    text, calls = read(HermesReader(NAMES), parts)
    assert [name for name, _ in calls] == ["add", "sub"]
    assert read(FirstCallReader(HermesReader(NAMES)), parts) == (text, calls[:1])
