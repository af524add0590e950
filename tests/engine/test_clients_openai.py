"""The official client against the real model: what people's programs do, with answers that can be checked."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from served import REAL, Served, eventually, served

pytestmark = pytest.mark.suite("cpu")

PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["kind", "tall", "old"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Capital(BaseModel):
    """What the parsing helper is asked to fill."""

    country: str
    capital: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("openai"), *REAL) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as connected:
        yield connected


@pytest.fixture(scope="module")
def model(client: Any) -> str:
    (only,) = client.models.list()
    return only.id


def test_a_question_whole_and_streamed(client: Any, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "messages": PARIS, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    print(text)
    assert "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 3, (
        "one by one"
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_async_client_with_many_at_once(server: Served, model: str) -> None:
    async def crowd() -> list[str]:
        client: Any
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:

            async def one(word: str) -> str:
                messages = [{"role": "user", "content": f"Repeat the word {word}."}]
                stream = await client.chat.completions.create(
                    model=model, messages=messages, temperature=0, max_tokens=16, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(word) for word in ("apple", "river", "stone", "cloud")))

    answers = asyncio.run(crowd())
    print(answers)
    assert len(set(answers)) == 4
    assert [word in answer.lower() for word, answer in zip(("apple", "river"), answers, strict=False)] == [
        True
    ] * 2


def test_leaving_a_stream_ends_the_request(server: Served, client: Any, model: str) -> None:
    stream = client.completions.create(model=model, prompt="Once", max_tokens=4000, stream=True)
    for _, _ in zip(stream, range(3), strict=False):
        pass
    assert not server.is_idle()
    stream.close()
    eventually(server.is_idle, 2)


def test_a_schema_holds_the_answer(client: Any, model: str) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages = [{"role": "user", "content": "Describe a person as JSON."}]
    for seed in range(2):
        answer = client.chat.completions.create(
            model=model, messages=messages, response_format=shape, seed=seed, temperature=1.5, max_tokens=200
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)
    answer = client.chat.completions.create(
        model=model, messages=messages, response_format={"type": "json_object"}, temperature=0, max_tokens=30
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    parsed = client.chat.completions.parse(
        model=model, messages=PARIS, response_format=Capital, temperature=0, max_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_tool_calls_follow_their_schema(client: Any, model: str, choice: str, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "How is the weather in Oslo?"}],
        "tools": [WEATHER, CLOCK] if choice == "named" else [WEATHER],
        "tool_choice": named if choice == "named" else "required",
        "temperature": 0,
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    if stream:
        with client.chat.completions.stream(**ask) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**ask).choices[0].message
    (call,) = message.tool_calls
    print(call.function.arguments)
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    # The conversation goes on with the tool's answer.
    history = [*ask["messages"], message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "12 degrees, rain"})
    reply = client.chat.completions.create(model=model, messages=history, tools=[WEATHER], max_tokens=24)
    assert reply.choices[0].message.content or reply.choices[0].message.tool_calls


def test_free_tool_choice_may_answer_in_words(client: Any, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=PARIS, tools=[CLOCK], tool_choice="auto", temperature=0, max_tokens=48
    )
    message = answer.choices[0].message
    assert bool(message.content) or bool(message.tool_calls)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_logprobs_are_those_of_a_distribution(client: Any, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=PARIS, temperature=0, max_tokens=8, logprobs=True, top_logprobs=5
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 5 and tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0], "greedy takes the likeliest"
        assert sum(math.exp(top) for top in tops) <= 1 + 1e-6
    shown = b"".join(bytes(entry.bytes) for entry in entries if not entry.token.startswith("<|"))
    assert shown.decode() == answer.choices[0].message.content
    legacy = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    found = legacy.choices[0].logprobs
    assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])
    assert "".join(found.tokens) == legacy.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(len(found.tokens))]


def test_a_seed_repeats_and_choices_differ(client: Any, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "prompt": "Once upon a time", "max_tokens": 24, "seed": 7, "n": 3}
    first, second = client.completions.create(**ask), client.completions.create(**ask)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    other = client.completions.create(**ask | {"seed": 8})
    assert texts != [choice.text for choice in other.choices]


def test_stop_strings_end_the_answer(client: Any, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**ask).choices[0].text
    assert "7" in free
    stopped = client.completions.create(**ask, stop=["7"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index("7")], "stop")
    chunks = list(client.completions.create(**ask, stop=["7"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == stopped.text


def test_extensions_go_through_extra_body(client: Any, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=PARIS, max_tokens=12, extra_body={"regex": "(yes|no)[.]", "top_k": 5}
    )
    assert answer.choices[0].message.content in ("yes.", "no.")


def test_mistakes_are_the_exceptions_that_the_client_knows(client: Any, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=model, input="no pooling here")
    print(refused.value.message)
    assert "pooling" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=PARIS)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=PARIS, max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=PARIS, extra_body={"temprature": 1})
    assert "temperature" in refused.value.message
