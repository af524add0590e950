"""Every bad request gets its 4xx in OpenAI's shape, names the field, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_client import CONTEXT_LENGTH, VOCAB_SIZE, FakeClient
from running_server import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, InProcess

from lockstep.features.grammar import cannot_go_on
from lockstep.server import errors
from lockstep.server.schema.base import MAX_PROMPTS

pytestmark = pytest.mark.suite("cpu")

App = Callable[..., InProcess]

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO} | fields


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "hi"} | fields


def native(**params: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"text": "hi", "sampling_params": params}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "hi"} | fields]}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


BAD = [
    # what is sent, the field that the answer must name, a part of its text
    (chat(mesages=[]), "mesages", "did you mean 'messages'?"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'?"),
    (chat(xyzzy=1), "xyzzy", "unknown field 'xyzzy'"),
    (text(max_token=1), "max_token", "did you mean 'max_tokens'?"),
    (message(contents="x"), "messages[0].contents", "did you mean 'content'?"),
    (
        chat(stream=True, stream_options={"include_usages": True}),
        "stream_options.include_usages",
        "include_usage",
    ),
    (native(max_tokens=3), "sampling_params.max_tokens", "did you mean 'max_new_tokens'?"),
    (("/generate", {"txt": "hi"}), "txt", "did you mean 'text'?"),
    (("/tokenize", {"prompts": "hi"}), "prompts", "did you mean 'prompt'?"),
    ((CHAT, {}), "messages", "field required"),
    ((CHAT, {"messages": []}), "messages", "at least 1 item"),
    ((CHAT, {"messages": "hi"}), "messages", "valid list"),
    ((CHAT, []), None, "must be a JSON object"),
    ((CHAT, "hi"), None, "must be a JSON object"),
    (message(role="robot"), "messages[0].role", "'system'"),
    (message(content=None), "messages[0]", "needs content"),
    (message(content=5), "messages[0].content", "string or an array"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content", "text only"),
    (message(content=[{"type": "txt"}]), "messages[0].content", "content part"),
    (message(role="tool"), "messages[0]", "tool_call_id"),
    (chat(temperature="hot"), "temperature", "valid number"),
    (chat(temperature=True), "temperature", "valid number"),
    (chat(temperature=-0.1), "temperature", "from 0"),
    (chat(top_p=0), "top_p", "above 0"),
    (chat(top_p=1.5), "top_p", "not 1.5"),
    (chat(min_p=-1), "min_p", "from 0"),
    (chat(top_k=-2), "top_k", "at least -1"),
    (chat(top_k=1.5), "top_k", "valid integer"),
    (chat(presence_penalty=3), "presence_penalty", "-2"),
    (chat(frequency_penalty=-3), "frequency_penalty", "-2"),
    (chat(repetition_penalty=0.001), "repetition_penalty", "from 0.01"),
    (chat(n=0), "n", "from 1"),
    (chat(max_tokens=0), "max_tokens", "at least 1"),
    (chat(max_completion_tokens=-5), "max_completion_tokens", "at least 1"),
    (chat(max_tokens="5"), "max_tokens", "valid integer"),
    (chat(max_tokens=CONTEXT_LENGTH), "max_tokens", f"context of {CONTEXT_LENGTH}"),
    (chat(max_completion_tokens=CONTEXT_LENGTH), "max_completion_tokens", "max_completion_tokens"),
    (text(max_tokens=CONTEXT_LENGTH), "max_tokens", f"at most {CONTEXT_LENGTH - 2}"),
    (native(max_new_tokens=CONTEXT_LENGTH), "max_new_tokens", "max_new_tokens"),
    (native(max_new_tokens=0), "max_new_tokens", "max_new_tokens must be at least 1"),
    (chat(min_tokens=9, max_tokens=3), "min_tokens", "more than max_tokens"),
    (native(min_new_tokens=9, max_new_tokens=3), "min_new_tokens", "more than max_new_tokens"),
    (chat(stop=["a"] * 17), "stop", "at most 16"),
    (chat(stop=""), "stop", "non-empty"),
    (chat(stop=[1]), "stop[0]", "valid string"),
    (chat(stop_token_ids=[-1]), "stop_token_ids", "token ids"),
    (chat(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids", "out of range"),
    (chat(logit_bias={"x": 1}), "logit_bias", "token ids"),
    (chat(logit_bias={"5": 101}), "logit_bias", "between -100 and 100"),
    (chat(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias", "out of range"),
    (chat(top_logprobs=3), "top_logprobs", "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "logprobs", "from 0 to 20"),
    (text(logprobs=True), "logprobs", "valid integer"),
    (chat(stream_options={"include_usage": True}), "stream_options", "'stream' is true"),
    (chat(response_format={"type": "yaml"}), "response_format.type", "'json_schema'"),
    (chat(response_format={"type": "json_schema"}), "response_format", "'json_schema' must be given"),
    (chat(json_schema={"type": "strange"}), "json_schema", "broken"),
    (chat(regex="("), "regex", "broken"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}),
        "response_format",
        "broken",
    ),
    (
        chat(
            tools=[
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}},
                }
            ],
            tool_choice="required",
        ),
        "tools",
        "broken",
    ),
    (chat(ebnf="start: ("), "ebnf", "broken"),
    (text(regex="["), "regex", "broken"),
    (native(regex="["), "regex", "broken"),
    (chat(regex="a", ebnf="b"), "ebnf", "exclude each other"),
    (chat(regex="a", response_format={"type": "json_object"}), "response_format", "exclude each other"),
    (chat(deadline_s=0), "deadline_s", "greater than 0"),
    (chat(priority="high"), "priority", "valid integer"),
    (chat(request_id=""), "request_id", "at least 1"),
    (chat(tools=[TOOL, TOOL]), "tools", "same name"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "pattern"),
    (chat(tools=[{"type": "mcp"}]), "tools[0].type", "'function'"),
    (
        chat(tools=[{"type": "custom", "custom": {"name": "f"}}]),
        "tools[0].type",
        "custom tools are not supported",
    ),
    (
        chat(tools=[TOOL], tool_choice={"type": "custom", "custom": {"name": "f"}}),
        "tool_choice.type",
        "custom tools are not supported",
    ),
    (
        message(
            role="assistant", tool_calls=[{"id": "1", "type": "custom", "custom": {"name": "f", "input": "x"}}]
        ),
        "messages[0].tool_calls[0].type",
        "custom tools are not supported",
    ),
    (chat(tools=[TOOL], tool_choice={"type": "allowed_tools"}), "tool_choice.allowed_tools", "required"),
    (chat(tools=[TOOL], tool_choice=allowed("never", "look")), "tool_choice.allowed_tools.mode", "'required'"),
    (chat(tools=[TOOL], tool_choice=allowed("auto")), "tool_choice.allowed_tools.tools", "at least 1 item"),
    (chat(tools=[TOOL], tool_choice=allowed("auto", "lok")), "tool_choice", "no tool is named 'lok'"),
    (chat(tool_choice=allowed("auto", "look")), "tool_choice", "needs 'tools'"),
    (chat(tools=[TOOL], tool_choice={"type": "functions"}), "tool_choice.type", "'function'"),
    (chat(tool_choice="required"), "tool_choice", "needs 'tools'"),
    (chat(tools=[TOOL], tool_choice="maybe"), "tool_choice", "'required'"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "lok"}}),
        "tool_choice",
        "no tool is named 'lok'",
    ),
    (chat(tools=[TOOL], tool_choice="required", regex="a"), "tool_choice", "excludes"),
    (chat(continue_final_message=True), "continue_final_message", "role 'assistant'"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "field of its own"),
    (text(prompt=[]), "prompt", "expected a string"),
    (text(prompt=[1, "a"]), "prompt", "expected a string"),
    (text(prompt=5), "prompt", "expected a string"),
    (text(prompt=""), "prompt", "empty"),
    (text(prompt=[VOCAB_SIZE]), "prompt", "out of range"),
    (text(prompt=[-1]), "prompt", "out of range"),
    (text(prompt=[[1], [VOCAB_SIZE]]), "prompt", f"0 to {VOCAB_SIZE - 1}"),
    (text(prompt="x" * CONTEXT_LENGTH), "prompt", f"holds {CONTEXT_LENGTH}"),
    (text(prompt="x" * 17 * CONTEXT_LENGTH), "prompt", f"has {17 * CONTEXT_LENGTH} characters"),
    (message(content="x" * CONTEXT_LENGTH), "messages", f"holds {CONTEXT_LENGTH}"),
    (text(prompt=["x"] * (MAX_PROMPTS + 1)), "prompt", f"at most {MAX_PROMPTS}"),
    (text(prompt=[[1]] * (MAX_PROMPTS + 1)), "prompt", f"at most {MAX_PROMPTS}"),
    ((EMBEDDINGS, {"input": ["x"] * (MAX_PROMPTS + 1)}), "input", f"at most {MAX_PROMPTS}"),
    (("/generate", {"text": ["x"] * (MAX_PROMPTS + 1)}), "text", f"at most {MAX_PROMPTS}"),
    (("/generate", {"input_ids": [[1]] * (MAX_PROMPTS + 1)}), "input_ids", f"at most {MAX_PROMPTS}"),
    (text(max_tokens=-1), "max_tokens", "at least 0"),
    (text(suffix="end"), "suffix", "not supported"),
    (text(n=3, best_of=2), "best_of", "less than n"),
    (text(best_of=2, stream=True), "best_of", "cannot be streamed"),
    ((EMBEDDINGS, {"input": "hi"}), "model", "declares no pooling"),
    ((EMBEDDINGS, {"input": "hi", "encoding_format": "hex"}), "encoding_format", "'base64'"),
    (("/generate", {}), "text", "exactly one"),
    (("/generate", {"text": "a", "input_ids": [1]}), "text", "exactly one"),
    (("/generate", {"input_ids": ["a"]}), "input_ids", "token ids"),
    (("/generate", {"text": 5}), "text", "valid string"),
    (("/detokenize", {"tokens": [VOCAB_SIZE]}), "tokens", "out of range"),
    (("/detokenize", {"tokens": ["a"]}), "tokens[0]", "valid integer"),
    (("/abort_request", {}), "rid", "either 'rid' or"),
]


@pytest.mark.parametrize(("sent", "param", "part"), BAD, ids=[f"{s[0]}-{p}-{t[:20]}" for s, p, t in BAD])
def test_bad_body(in_process: App, sent: tuple[str, Any], param: str | None, part: str) -> None:
    app = in_process()
    response = app.post(*sent)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert part in error["message"], error["message"]
    assert app.client.requests == []


MANY = 200_000
LONG_LISTS = [
    (chat(stop_token_ids=["a"] * MANY), "stop_token_ids[0]"),
    (chat(stop=[1] * MANY), "stop[0]"),
    (chat(messages=[{}] * MANY), "messages[0].role"),
    (chat(tools=[{}] * MANY), "tools[0].type"),
    (
        chat(
            tools=[TOOL],
            tool_choice=allowed("auto") | {"allowed_tools": {"mode": "auto", "tools": [{}] * MANY}},
        ),
        "tool_choice.allowed_tools.tools[0].function",
    ),
    (message(tool_calls=[{}] * MANY), "messages[0].tool_calls[0].id"),
    (chat(logit_bias={str(number): "x" for number in range(MANY)}), "logit_bias"),
    (("/detokenize", {"tokens": ["a"] * MANY}), "tokens[0]"),
    (("/generate", {"text": [1] * MAX_PROMPTS}), "text[0]"),
]


@pytest.mark.parametrize(("sent", "param"), LONG_LISTS, ids=[param for _, param in LONG_LISTS])
def test_a_long_list_is_one_complaint(
    sent: tuple[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaints are found while nobody else is served, and each takes memory."""
    seen: list[int] = []
    explain = errors.explain_validation
    monkeypatch.setattr(
        errors, "explain_validation", lambda found: (seen.append(len(found)), explain(found))[1]
    )
    response = InProcess(FakeClient()).post(*sent)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert max(seen) <= 3


def test_a_long_name_is_not_sent_back_whole(in_process: App) -> None:
    for sent in (chat(**{"x" * 100_000: 1}), chat(model="x" * 100_000)):
        response = in_process().post(*sent)
        assert 400 <= response.status_code < 500 and len(response.content) < 3000, response.text
        assert "xxx" in response.json()["error"]["message"]


RAW = [
    (b"{bad", "not valid JSON at character 1"),
    (b"", "JSON object"),
    (b'{"messages": [', "not valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": "\xff"}', "not UTF-8: byte 7"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (b'{"\\ud800": 1}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "h"}], "temperature": NaN}', "finite number"),
    (b'{"messages": [{"role": "user", "content": "h"}], "top_p": Infinity}', "finite number"),
    (b'{"messages": [{"role": "user", "content": "h"}], "temperature": 1e999}', "finite number"),
    (b'{"messages": [{"role": "user", "content": "h"}], "temperature": 1' + b"0" * 400 + b"}", "valid number"),
    (b'{"messages": [{"role": "user", "content": "h"}], "seed": 1' + b"0" * 60 + b"}", "seed"),
    (b'{"messages": [{"role": "user", "content": "h"}], "deadline_s": NaN}', "deadline_s"),
]


@pytest.mark.parametrize(("body", "part"), RAW, ids=[part for _, part in RAW])
def test_bad_bytes(in_process: App, body: bytes, part: str) -> None:
    app = in_process()
    response = app.send("POST", CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert part in response.json()["error"]["message"]
    assert app.client.requests == []


def test_text_that_spells_a_token_beyond_the_vocabulary(in_process: App) -> None:
    """A tokenizer may have more ids than the model has embeddings."""
    client = FakeClient()
    client.card = replace(client.card, vocab_size=ord("x"))
    for path, sent in (
        (COMPLETIONS, {"prompt": "fox"}),
        (CHAT, {"messages": HELLO}),
        ("/generate", {"text": "x"}),
    ):
        response = in_process(client).post(path, sent)
        assert response.status_code == 400 and "out of range" in response.json()["error"]["message"]
    assert client.requests == []


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (chat(min_tokens=2**63 - 1), "min_tokens"),
        (chat(min_tokens=2**70), "min_tokens"),
        (chat(top_k=2**70), "top_k"),
        (chat(priority=2**70), "priority"),
        (("/generate", {"text": "hi", "priority": -(2**70)}), "priority"),
        (text(n=0, best_of=1), "n"),
        (text(n=-1, best_of=3), "n"),
    ],
)
def test_numbers_that_no_engine_holds(in_process: App, sent: tuple[str, dict[str, Any]], param: str) -> None:
    app = in_process()
    response = app.post(*sent)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert app.client.requests == []


def test_template_variables_may_have_any_name(in_process: App) -> None:
    response = in_process().post(*chat(chat_template_kwargs={"self": 1}))
    assert response.status_code == 200, response.text


def test_parameters_nested_too_deeply(in_process: App) -> None:
    nested = '{"type": "object", "properties": {"a": ' * 400 + "{}" + "}}" * 400
    tool = f'{{"type": "function", "function": {{"name": "look", "parameters": {nested}}}}}'
    body = (
        f'{{"messages": [{{"role": "user", "content": "hi"}}], "tools": [{tool}], "tool_choice": "required"}}'
    )
    sent = {"content": body.encode(), "headers": {"content-type": "application/json"}}
    response = in_process().send("POST", CHAT, **sent)
    assert response.status_code == 400, response.text


def test_wrong_content_type_says_which(in_process: App) -> None:
    response = in_process().send("POST", CHAT, content=b"a=b", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, "/tokenize"])
def test_unknown_model_is_404(in_process: App, path: str) -> None:
    body = {"model": "tinny", "messages": HELLO, "prompt": "hi", "input": "hi"}
    wanted = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input", "/tokenize": "prompt"}[path]
    response = in_process(FakeClient(pooling="mean")).post(path, {k: body[k] for k in ("model", wanted)})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "did you mean 'tiny'?" in error["message"]


def test_unknown_path_and_method(in_process: App) -> None:
    app = in_process()
    lost = app.get("/v1/chat/complete")
    assert lost.status_code == 404
    assert lost.json()["error"]["code"] == "unknown_path"
    assert "did you mean '/v1/chat/completions'?" in lost.json()["error"]["message"]
    for path, hint in [("/v1/responses", ""), ("/chat/completions", "; did you mean '/v1/chat/completions'?")]:
        assert app.get(path).json()["error"]["message"] == f"no such path: {path}{hint}"
    wrong = app.get("/flush_cache")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_embedding_of_another_size_is_refused(in_process: App) -> None:
    response = in_process(FakeClient(pooling="mean")).post(EMBEDDINGS, {"input": "hi", "dimensions": 2})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "dimensions")


def test_model_without_chat_template(in_process: App) -> None:
    response = in_process(FakeClient(template=None)).post(*chat())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")


def test_template_that_refuses(in_process: App) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    response = in_process(FakeClient(template=template)).post(*chat())
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


def test_request_id_in_use(in_process: App) -> None:
    app = in_process()
    app.app.state.gateway._groups["mine"] = object()
    response = app.post(*chat(request_id="mine"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "request_id")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate"])
def test_full_queue_is_503_with_retry_after(in_process: App, path: str, stream: bool) -> None:
    body = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "hi"}, "/generate": {"text": "hi"}}[path]
    response = in_process(FakeClient(is_full=True)).post(path, body | {"stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"]["code"] == "queue_full"
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_dead_engine_is_503(in_process: App, stream: bool) -> None:
    response = in_process(FakeClient(is_alive=False)).post(*chat(stream=stream))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_failed_generation_is_500(in_process: App, stream: bool) -> None:
    response = in_process(FakeClient(fail_with="NaN in logits")).post(*chat(stream=stream))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    assert "NaN in logits" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (chat(regex="a*"), "regex"),
        (text(prompt=["a", "b"], ebnf='start: "a"'), "ebnf"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        (native(json_schema={}), "json_schema"),
        (chat(tools=[TOOL], tool_choice="required"), "tools"),
    ],
)
def test_a_grammar_that_fails_late_is_400(
    in_process: App, sent: tuple[str, dict[str, Any]], param: str, stream: bool
) -> None:
    reason = str(cannot_go_on(5, "lexer error: too many states"))
    response = in_process(FakeClient(fail_with=reason)).post(sent[0], sent[1] | {"stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["message"], error["type"]) == (reason, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, "invalid_grammar")


def test_a_bug_is_500_without_details(in_process: App) -> None:
    def broken(request: object, index: int) -> str:
        raise RuntimeError("secret detail")

    response = in_process(FakeClient(answer=broken)).post(*chat())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
