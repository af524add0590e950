"""The official client, sync and async, against a real socket; and its types as the list of OpenAI's fields."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fake_client import FakeClient
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel
from running_server import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, InProcess, Live

from lockstep.server.schema.base import Strict
from lockstep.server.schema.chat import ChatCompletionRequest
from lockstep.server.schema.completions import CompletionRequest, EmbeddingRequest

pytestmark = pytest.mark.suite("cpu")

Start = Callable[..., Live]


def connect(server: Live, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, **options)


SPECIFIED = [
    (ChatCompletionRequest, chat_create_params.CompletionCreateParamsBase, {"stream"}),
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase, {"stream"}),
    (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams, set()),
]


@pytest.mark.parametrize(("ours", "theirs", "extra"), SPECIFIED, ids=["chat", "completions", "embeddings"])
def test_every_specified_field_is_accepted(ours: type[Strict], theirs: type, extra: set[str]) -> None:
    specified = set(theirs.__annotations__) | extra
    assert specified, "the client's types moved"
    assert specified <= set(ours.wire_names())


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_ignored_fields_change_nothing(in_process: Callable[..., InProcess], path: str) -> None:
    kinds = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest, EMBEDDINGS: EmbeddingRequest}
    body = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "a"}, EMBEDDINGS: {"input": "a"}}[path]
    app = in_process(FakeClient(pooling="mean" if path == EMBEDDINGS else None))
    assert app.post(path, body).status_code == 200
    ignored = {name: {"any": ["thing"]} for name in kinds[path].ignored}
    assert app.post(path, body | ignored).status_code == 200
    first, second = app.client.requests
    assert (first.prompt_token_ids, first.params) == (second.prompt_token_ids, second.params)


def test_chat_and_models(live: Start) -> None:
    client = connect(live())
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lockstep"
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "Hello, world."
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "I"
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    # What a client gets, it may send back.
    history = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]
    assert client.chat.completions.create(model="tiny", messages=history).usage.completion_tokens == 13


def test_chat_stream(live: Start) -> None:
    client = connect(live())
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world."
    assert chunks[-1].usage.completion_tokens == 13


def test_stream_helper_collects_tool_calls(live: Start) -> None:
    calls = ['{"name": "add", "arguments": {"a": 1}}', '{"name": "add"}']
    text = "Let me. " + "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    client = connect(live(FakeClient(answer=lambda r, i: text)))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=tools) as stream:
        message = stream.get_final_completion().choices[0]
    assert message.finish_reason == "tool_calls"
    assert message.message.content == "Let me. "
    assert [call.function.arguments for call in message.message.tool_calls] == ['{"a": 1}', "{}"]
    assert len({call.id for call in message.message.tool_calls}) == 2


class Point(BaseModel):
    x: int
    y: int


def test_parsed_output_and_required_tools(live: Start) -> None:
    server = live(
        FakeClient(answer=lambda r, i: '{"x": 1, "y": 2}' if len(r.params.grammar.source) < 300 else CALLS)
    )
    client = connect(server)
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point)
    assert parsed.choices[0].message.parsed == Point(x=1, y=2)
    assert json.loads(server.client.requests[0].params.grammar.source)["required"] == ["x", "y"]
    tools = [openai.pydantic_function_tool(Point, name="plot")]
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, tools=tools, tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Point(x=3, y=4)


CALLS = '[{"name": "plot", "arguments": {"x": 3, "y": 4}}]'


def test_completions_and_embeddings(live: Start) -> None:
    client = connect(live())
    answer = client.completions.create(model="tiny", prompt=["a", "b"], echo=True, logprobs=1, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["aHe", "bHe"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello, world."
    vectors = connect(live(FakeClient(pooling="last"))).embeddings.create(model="tiny", input=["ab", "c"])
    assert [entry.embedding for entry in vectors.data] == [[195.0, 0.5, -1.0], [99.0, 0.5, -1.0]]


def test_extensions_travel_in_extra_body(live: Start) -> None:
    server = live()
    extra = {"top_k": 5, "regex": "[a-z]+", "ignore_eos": True}
    connect(server).chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
    params = server.client.requests[0].params
    assert (params.top_k, params.grammar.source, params.ignore_eos) == (5, "[a-z]+", True)


def test_errors_are_the_clients_own(live: Start) -> None:
    client = connect(live())
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="unknown model 'large'"):
        client.chat.completions.create(model="large", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        connect(live(api_key="right")).models.list()
    with pytest.raises(openai.InternalServerError, match="queue is full"):
        connect(live(FakeClient(is_full=True))).chat.completions.create(model="tiny", messages=HELLO)
    with pytest.raises(openai.APIError, match="engine died"):
        list(
            connect(live(FakeClient(die_after=2))).chat.completions.create(
                model="tiny", messages=HELLO, stream=True
            )
        )


def test_async_client_side_by_side(live: Start) -> None:
    server = live(FakeClient(answer=lambda r, i: f"answer {r.params.seed}", delay_s=0.002))

    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused") as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(48)))

    assert asyncio.run(crowd()) == [f"answer {seed}" for seed in range(48)]
