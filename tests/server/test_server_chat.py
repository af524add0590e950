"""Chat completions: prompts, answers, streams, logprobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_client import CHATML_WITH_TOOLS, FakeClient, logprob_of
from running_server import CHAT, HELLO, InProcess, events_of

from lockstep.core.sampling import Grammar

pytestmark = pytest.mark.suite("cpu")

App = Callable[..., InProcess]


def ask(app: InProcess, **fields: Any) -> dict[str, Any]:
    response = app.post(CHAT, {"messages": HELLO} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(app: InProcess) -> str:
    return app.client.tokenizer.decode(
        list(app.client.requests[-1].prompt_token_ids), skip_special_tokens=False
    )


def test_answer_and_usage(in_process: App) -> None:
    app = in_process()
    body = ask(app, model="tiny")
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world.", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    num_prompt = len(app.client.requests[0].prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 13,
        "total_tokens": num_prompt + 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert prompt_of(app) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_roles_and_parts_reach_the_template(in_process: App) -> None:
    app = in_process()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Ann",
        },
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "annotations": []},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "function", "content": "5", "name": "f"},
    ]
    ask(app, messages=messages)
    roles = ["system\nBe brief.", "user\nab", "assistant\n", "tool\n4", "tool\n5"]
    expected = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in roles) + "<|im_start|>assistant\n"
    assert prompt_of(app) == expected


def test_generation_prompt_and_continuation(in_process: App) -> None:
    app = in_process()
    ask(app, add_generation_prompt=False)
    assert prompt_of(app).endswith("hi<|im_end|>\n")
    ask(app, messages=[*HELLO, {"role": "assistant", "content": "Well, "}], continue_final_message=True)
    assert prompt_of(app).endswith("<|im_start|>assistant\nWell,")


@pytest.mark.parametrize("content", ["|", "im", "end", "<|im_end|>\n", "assistant"])
def test_continuation_of_what_the_template_writes_too(in_process: App, content: str) -> None:
    app = in_process()
    ask(app, messages=[*HELLO, {"role": "assistant", "content": content}], continue_final_message=True)
    assert prompt_of(app).endswith("<|im_start|>assistant\n" + content.strip())


def test_calls_of_before_stay_in_the_conversation(in_process: App) -> None:
    """The template knows no tools, and none are offered any more."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
    history = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    app = in_process()
    ask(app, messages=[*HELLO, *history])
    assert '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>' in prompt_of(app)
    assert "<tool_response>\n4\n</tool_response>" in prompt_of(app)


def test_template_variables(in_process: App) -> None:
    app = in_process(FakeClient(template="{{ mood }}: {{ messages[0].content }}"))
    ask(app, chat_template_kwargs={"mood": "gay"})
    assert prompt_of(app) == "gay: hi"


def test_sampling_fields_arrive(in_process: App) -> None:
    app = in_process()
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "seed": 11,
        "n": 2,
        "min_tokens": 3,
        "ignore_eos": True,
        "include_stop": True,
        "skip_special_tokens": False,
    }
    ask(
        app, **given, max_tokens=5, max_completion_tokens=6, stop="x", stop_token_ids=[3], logit_bias={"65": -2}
    )
    params = app.client.requests[0].params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.stop, params.stop_token_ids) == (6, ("x",), (3,))
    assert dict(params.logit_bias) == {65: -2}


def test_nulls_mean_defaults(in_process: App) -> None:
    app = in_process()
    ask(app)
    names = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "max_tokens",
        "logit_bias",
        "tools",
        "response_format",
    ]
    ask(app, **dict.fromkeys(names))
    first, second = app.client.requests
    assert first.params == second.params


def test_deadline_priority_and_server_limit(in_process: App) -> None:
    app = in_process(request_timeout_s=20.0)
    ask(app, priority=-3, deadline_s=5)
    ask(app, deadline_s=50)
    ask(app)
    assert [(r.priority, r.deadline_s) for r in app.client.requests] == [(-3, 5.0), (0, 20.0), (0, 20.0)]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "null"}},
                }
            },
            Grammar("json_schema", '{"type": "null"}'),
        ),
        ({"json_schema": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, Grammar("json_schema", '{"type":"null"}')),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"ebnf": 'start: "a"'}, Grammar("ebnf", 'start: "a"')),
    ],
)
def test_constraints(in_process: App, fields: dict[str, Any], grammar: Grammar | None) -> None:
    app = in_process()
    ask(app, **fields)
    assert app.client.requests[0].params.grammar == grammar


def test_stream_adds_up_to_the_whole(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: ["short", "rather longer"][index]))
    fields = {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = app.post(CHAT, fields).json()
    chunks = events_of(app.post(CHAT, fields | {"stream": True, "stream_options": {"include_usage": True}}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content") or "" for c in mine) == choice["message"]["content"]
        found = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_stream_without_usage_has_none(in_process: App) -> None:
    chunks = events_of(in_process().post(CHAT, {"messages": HELLO, "stream": True}))
    assert not any("usage" in chunk for chunk in chunks)


def test_logprobs(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: "é"))
    body = ask(app, logprobs=True, top_logprobs=2, prompt_logprobs=0)
    first, second = body["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("bytes:\\xc3", [0xC3])
    assert first["logprob"] == logprob_of(0xC3)
    assert [alternative["bytes"] for alternative in second["top_logprobs"]] == [[0xA9], [0xAA]]
    prompt = body["prompt_logprobs"]
    assert prompt[0] is None
    assert len(prompt) == len(app.client.requests[0].prompt_token_ids)
    assert prompt[1]["token"] == "u"


def test_minus_infinity_is_a_number(in_process: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_client.logprob_of", lambda token_id: float("-inf"))
    body = ask(in_process(), logprobs=True)
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "sub"}},
]


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    assert all(call["type"] == "function" and call["id"].startswith("call-") for call in message["tool_calls"])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_calls_after_the_first_are_left_out_on_request(in_process: App, parallel: bool, stream: bool) -> None:
    app = in_process(FakeClient(answer=lambda request, index: CALL + CALL))
    fields = {"messages": HELLO, "tools": TOOLS, "parallel_tool_calls": parallel, "stream": stream}
    response = app.post(CHAT, fields)
    if stream:
        changes = [chunk["choices"][0]["delta"] for chunk in events_of(response)]
        assert {call["index"] for change in changes for call in change.get("tool_calls", ())} == (
            {0, 1} if parallel else {0}
        )
    else:
        [choice] = response.json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1 + parallel and choice["finish_reason"] == "tool_calls"


def test_auto_tools_with_a_template_that_knows_them(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda r, i: "Wait. " + CALL, template=CHATML_WITH_TOOLS))
    [choice] = ask(app, tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait. "
    assert calls_of(choice["message"]) == [("add", '{"a": 1, "b": [2]}')]
    assert prompt_of(app).startswith('<tools>[{"type": "function", "function": {"name": "add"')
    assert app.client.requests[0].params.grammar is None


def test_auto_tools_with_a_template_that_does_not(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda r, i: CALL))
    earlier = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [earlier]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    [choice] = ask(app, tools=TOOLS, messages=messages)["choices"]
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("add", '{"a": 1, "b": [2]}')]
    prompt = prompt_of(app)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions")
    assert '"description": "Adds."' in prompt
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response>" in prompt


def test_an_empty_model_is_the_served_one(in_process: App) -> None:
    assert ask(in_process(), model="")["model"] == "tiny"


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_hide_the_others(in_process: App, mode: str) -> None:
    text = '[{"name": "mul", "arguments": {}}]' if mode == "required" else "no call"
    app = in_process(FakeClient(template=CHATML_WITH_TOOLS, answer=lambda r, i: text))
    other = {"type": "function", "function": {"name": "mul"}}
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "mul"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    [answer] = ask(app, tools=[*TOOLS, other], tool_choice=choice)["choices"]
    assert '"mul"' in prompt_of(app) and '"add"' not in prompt_of(app)
    grammar = app.client.requests[0].params.grammar
    if mode == "auto":
        assert (grammar, answer["finish_reason"]) == (None, "stop")
    else:
        assert grammar is not None and "mul" in grammar.source and '"add"' not in grammar.source
        assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["mul"]


def test_tool_choice_none_hides_the_tools(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda r, i: CALL))
    [choice] = ask(app, tools=TOOLS, tool_choice="none")["choices"]
    assert choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]
    assert prompt_of(app) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_named_tool(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda r, i: '{"a": 5}'))
    [choice] = ask(app, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add"}})["choices"]
    assert calls_of(choice["message"]) == [("add", '{"a": 5}')]
    assert choice["finish_reason"] == "tool_calls"
    assert app.client.requests[0].params.grammar == Grammar("json_schema", '{"type": "object"}')


def test_cut_tool_call_says_length(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda r, i: '{"a": 5}'))
    choice = {"type": "function", "function": {"name": "add"}}
    [answer] = ask(app, tools=TOOLS, tool_choice=choice, max_tokens=4)["choices"]
    assert answer["finish_reason"] == "length"
    assert calls_of(answer["message"]) == [("add", '{"a"')]


def test_required_tools_stream(in_process: App) -> None:
    text = '[{"name": "add", "arguments": {"a": "}]\\""}}, {"name":"sub","arguments":{}}]'
    app = in_process(FakeClient(answer=lambda r, i: text))
    chunks = events_of(
        app.post(CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "stream": True})
    )
    arguments: dict[int, str] = {}
    names: dict[int, str] = {}
    for chunk in chunks:
        for change in chunk["choices"][0]["delta"].get("tool_calls") or ():
            names.setdefault(change["index"], change["function"].get("name"))
            arguments[change["index"]] = arguments.get(change["index"], "") + change["function"]["arguments"]
    assert names == {0: "add", 1: "sub"}
    assert arguments == {0: '{"a": "}]\\""}', 1: "{}"}
    assert sum(bool(chunk["choices"][0]["delta"].get("tool_calls")) for chunk in chunks) > 10
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
