"""Grammars on a real server: forced calls end by themselves, what fails fails alone, nobody waits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import CHAT, COMPLETIONS, REAL, Served, served

pytestmark = pytest.mark.suite("cpu", exclusive=True)

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
            "required": ["x", "ok"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "subtract"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("grammars"), *REAL) as server:
        yield server


CHOICES = [
    {"type": "function", "function": {"name": "add"}},
    {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
    },
]


@pytest.mark.parametrize("choice", CHOICES, ids=["named", "allowed"])
def test_a_forced_call_ends_with_its_json(server: Served, choice: dict[str, Any]) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is 2 + 2?"}],
        "tools": [ADD, OTHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    answer = server.http.post(CHAT, json=body).json()
    [found] = answer["choices"]
    assert found["finish_reason"] == "tool_calls"
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert set(json.loads(call["function"]["arguments"])) == {"x", "ok"}
    assert answer["usage"]["completion_tokens"] < 60


# After some two hundred letters the lexer cannot go on; a few tried tokens do not get there.
LATE = r"[a-z ]{200}(\w{1,200}){1,200}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_fails_late_is_the_clients(server: Served, stream: bool) -> None:
    body = {"prompt": "Once upon a time", "regex": LATE, "max_tokens": 300, "temperature": 0, "stream": stream}
    answer = server.http.post(COMPLETIONS, json=body)
    if stream:
        last = answer.text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        "regex",
        "invalid_grammar",
    )
    assert "cannot go on" in error["message"]
    assert server.answers()
