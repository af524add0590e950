"""Text completions, embeddings, native generation."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
from fake_client import CONTEXT_LENGTH, ByteTokenizer, FakeClient, logprob_of
from running_server import COMPLETIONS, EMBEDDINGS, InProcess, events_of

from lockstep.core.step import TokenLogprob
from lockstep.server.logprobs import LegacyLogprobs
from lockstep.tokenizer.token_ids_only import TokenIdsOnly

pytestmark = pytest.mark.suite("cpu")

App = Callable[..., InProcess]


def complete(app: InProcess, **fields: Any) -> dict[str, Any]:
    response = app.post(COMPLETIONS, {"prompt": "ab"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
def test_four_spellings_of_prompts(in_process: App, prompt: Any, ids: list[tuple[int, ...]]) -> None:
    app = in_process(FakeClient(answer=lambda request, index: f"{request.prompt_token_ids}"))
    body = complete(app, prompt=prompt, max_tokens=50)
    assert [choice["text"] for choice in body["choices"]] == [str(prompt_ids) for prompt_ids in ids]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_many_prompts_many_choices_keep_their_order(in_process: App) -> None:
    app = in_process(
        FakeClient(answer=lambda request, index: f"{bytes(request.prompt_token_ids).decode()}/{index}")
    )
    prompts = [str(number) for number in range(150)]  # more than run at once
    body = complete(app, prompt=prompts, n=2)
    assert [choice["text"] for choice in body["choices"]] == [f"{p}/{i}" for p in prompts for i in range(2)]
    chunks = events_of(app.post(COMPLETIONS, {"prompt": prompts, "n": 2, "stream": True}))
    texts: dict[int, str] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert [texts[index] for index in range(300)] == [choice["text"] for choice in body["choices"]]


def test_one_failing_prompt_ends_the_others(in_process: App) -> None:
    app = in_process(FakeClient(die_after=3))
    response = app.post(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert response.status_code == 503
    assert app.client.running == {}
    assert len(app.client.closed_early) == 3


def test_default_length_is_sixteen_or_what_fits(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: "x" * 40))
    assert len(complete(app)["choices"][0]["text"]) == 16
    assert len(complete(app, prompt="x" * (CONTEXT_LENGTH - 3))["choices"][0]["text"]) == 3
    assert len(complete(app, min_tokens=20)["choices"][0]["text"]) == 20


def test_loglikelihood_as_evaluation_harnesses_ask_for_it(in_process: App) -> None:
    """The request of lm-eval's local-completions, and the way in which it reads the answer."""
    app = in_process(FakeClient(answer=lambda request, index: "Z"))
    context, continuation = list(b"2+2="), list(b"four")
    fields = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    [choice] = complete(app, prompt=[context + continuation], **fields)["choices"]
    logprobs = choice["logprobs"]
    values = logprobs["token_logprobs"][len(context) : -1]
    top = logprobs["top_logprobs"][len(context) : -1]
    assert sum(values) == pytest.approx(sum(map(logprob_of, continuation)))
    assert [value == max(alternatives.values()) for value, alternatives in zip(values, top, strict=True)] == [
        True
    ] * 4
    assert choice["text"] == "2+2=fourZ"
    assert logprobs["tokens"] == list("2+2=fourZ")
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_new_tokens(in_process: App, stream: bool) -> None:
    app = in_process()
    fields = {"prompt": "aé", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    response = app.post(COMPLETIONS, fields)
    bodies = events_of(response) if stream else [response.json()]
    choice = bodies[0]["choices"][0]
    assert choice["text"] == "aé"
    assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
    assert choice["finish_reason"] == "length"
    if not stream:
        assert bodies[0]["usage"]["completion_tokens"] == 0


def test_offsets_point_into_the_text(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: "xyz"))
    [choice] = complete(app, echo=True, logprobs=1)["choices"]
    logprobs = choice["logprobs"]
    assert [choice["text"][at] for at in logprobs["text_offset"]] == logprobs["tokens"]
    [plain] = complete(app, logprobs=1)["choices"]
    assert plain["logprobs"]["text_offset"] == [0, 1, 2]


def test_offsets_of_an_echo_pass_over_what_is_not_in_it(in_process: App) -> None:
    """Special tokens of ids that are not shown, and those that a tokenizer puts before a text."""
    app = in_process(FakeClient(answer=lambda request, index: "xyz"))
    [choice] = complete(app, prompt=[256, 104, 256, 105], echo=True, logprobs=1)["choices"]
    assert choice["text"] == "hixyz"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3, 4]
    [shown] = complete(app, prompt=[256, 104], echo=True, logprobs=1, skip_special_tokens=False)["choices"]
    length = len(shown["text"]) - len("hxyz")
    assert shown["logprobs"]["text_offset"] == [0, *(length + at for at in range(4))] and length > 3


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("Hello you", [b"<s>", b" Hello", b" you"], [0, 0, 5]),
        (" Hello", [b"<s>", b" ", b" Hello"], [0, 0, 1]),
        ("Hello", [b"Hel", b"lo"], [0, 3]),
        ("\u00e9a", [b" ", b"\xc3", b"\xa9", b"a"], [0, 0, 0, 1]),
    ],
)
def test_offsets_where_a_space_is_put_before_a_text(text: str, tokens: list[bytes], offsets: list[int]) -> None:
    class Spaced(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return tokens[token_id] if token_id < len(tokens) else b"!"

        special_token_ids = frozenset({0} if tokens[0] == b"<s>" else ())

    legacy = LegacyLogprobs(Spaced(), 0, skip_special_tokens=True)
    assert legacy.add_echo([(index, None) for index in range(len(tokens))], text)["text_offset"] == offsets
    after = legacy.add([(99, TokenLogprob(99, -1.0, ()))])
    assert after["text_offset"] == [len(text)]


def test_echo_of_ids_is_their_text(in_process: App) -> None:
    assert complete(in_process(), prompt=[104, 105], echo=True)["choices"][0]["text"] == "hiHello, world."


def test_best_of_keeps_the_likeliest(in_process: App) -> None:
    answers = ["zzz", "aaa", "mmm"]  # made-up log-probabilities fall with the byte
    app = in_process(FakeClient(answer=lambda request, index: answers[index]))
    body = complete(app, best_of=3, n=2)
    assert [choice["text"] for choice in body["choices"]] == ["aaa", "mmm"]
    assert [choice["logprobs"] for choice in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 9


def test_stream_with_usage(in_process: App) -> None:
    fields = {"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events_of(in_process().post(COMPLETIONS, fields))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello, world."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 13)


def test_prompt_logprobs_extension(in_process: App) -> None:
    [choice] = complete(in_process(), prompt="abc", prompt_logprobs=1)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [entry["logprob"] for entry in rest] == [logprob_of(98), logprob_of(99)]


def test_embeddings(in_process: App) -> None:
    app = in_process(FakeClient(pooling="mean"))
    body = app.post(EMBEDDINGS, {"input": ["ab", "c"], "model": "tiny", "user": "x"}).json()
    assert [entry["embedding"] for entry in body["data"]] == [[195.0, 0.5, -1.0], [99.0, 0.5, -1.0]]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert {request.pooling for request in app.client.requests} == {"mean"}
    coded = app.post(EMBEDDINGS, {"input": [97, 98], "encoding_format": "base64", "dimensions": 3}).json()
    assert struct.unpack("<3f", base64.b64decode(coded["data"][0]["embedding"])) == (195.0, 0.5, -1.0)


def test_native_generate(in_process: App) -> None:
    app = in_process()
    body = app.post("/generate", {"text": "ab", "sampling_params": {"max_new_tokens": 2}, "rid": "mine"}).json()
    meta = body.pop("meta_info")
    assert body == {"text": "He", "output_ids": [72, 101]}
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 4,
    }
    app.post("/generate", {"text": "ab"})
    assert app.client.requests[-1].params.max_tokens == 128


def test_native_batches_and_choices(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: f"{request.prompt_token_ids[0]}{index}"))
    found = app.post("/generate", {"input_ids": [[65], [66]], "sampling_params": {"n": 2}}).json()
    assert [entry["text"] for entry in found] == ["650", "651", "660", "661"]
    assert isinstance(app.post("/generate", {"input_ids": [65]}).json(), dict)
    assert isinstance(app.post("/generate", {"text": ["a"]}).json(), list)


def test_native_stream_repeats_the_text_so_far(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: "abc"))
    events = events_of(app.post("/generate", {"text": "x", "stream": True}))
    assert [event["text"] for event in events] == ["a", "ab", "abc"]
    assert [event["meta_info"]["finish_reason"] for event in events] == [None, None, {"type": "stop"}]


def test_native_logprobs(in_process: App) -> None:
    app = in_process(FakeClient(answer=lambda request, index: "ab"))
    fields = {"text": "xy", "return_logprob": True, "top_logprobs_num": 2, "return_prompt_logprob": True}
    meta = app.post("/generate", fields).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[logprob_of(97), 97, "a"], [logprob_of(98), 98, "b"]]
    assert [[token_id for _, token_id, _ in row] for row in meta["output_top_logprobs"]] == [[97, 98], [98, 99]]
    assert meta["input_token_logprobs"] == [[logprob_of(121), 121, "y"]]


def test_tokenize_and_back(in_process: App) -> None:
    app = in_process()
    found = app.post("/tokenize", {"prompt": "hé<|im_end|>"}).json()
    assert found == {"tokens": [104, 0xC3, 0xA9, 257], "count": 4, "max_model_len": CONTEXT_LENGTH}
    assert app.post("/detokenize", {"tokens": found["tokens"]}).json() == {"text": "hé"}
    kept = app.post("/detokenize", {"tokens": found["tokens"], "skip_special_tokens": False}).json()
    assert kept == {"text": "hé<|im_end|>"}


def test_text_from_a_server_without_a_tokenizer_is_refused(in_process: App) -> None:
    """Even where the prompt is ids, for this kind of answer is text."""
    client = FakeClient()
    client.tokenizer = TokenIdsOnly()
    response = in_process(client).post(COMPLETIONS, {"prompt": [97, 98]})
    assert response.status_code == 400
    assert "an answer of text needs a tokenizer" in response.json()["error"]["message"]


def test_a_list_longer_than_the_queue_is_served(in_process: App) -> None:
    app = in_process(FakeClient(max_queued_requests=2))
    response = app.post(COMPLETIONS, {"prompt": [str(n) for n in range(10)]})
    assert response.status_code == 200, response.text
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(10))


def test_a_native_stream_writes_each_log_probability_once(
    in_process: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event shows all tokens so far; what a token is called is looked up when it comes."""
    asked: list[int] = []
    name_of = ByteTokenizer.token_text
    monkeypatch.setattr(
        ByteTokenizer, "token_text", lambda self, token_id: (asked.append(token_id), name_of(self, token_id))[1]
    )
    app = in_process(FakeClient(answer=lambda request, index: "x" * 50))
    fields = {"text": "ab", "stream": True, "return_logprob": True, "return_prompt_logprob": True}
    events = events_of(app.post("/generate", fields))
    shown = [event["meta_info"]["output_token_logprobs"] for event in events]
    assert [len(each) for each in shown] == list(range(1, 51))
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(shown))
    assert len(events[0]["meta_info"]["input_token_logprobs"]) == 1
    assert len(asked) <= 51
