"""Random requests of every kind, many at once, each answer checked for its form.

Against a server of your own, for as long as you like:

    python tests/engine/hammer.py http://127.0.0.1:30000 --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from askers import Asker, Outcome, asking
from served import CHAT, COMPLETIONS, events_in

NATIVE = "/generate"
NUM_CLIENTS = 16
WORDS = [
    "the",
    "sea",
    "a red",
    "ship",
    "12",
    "hills,",
    "night?",
    "Ünïcödé",
    "東京",
    "\n",
    "🙂",
    "(never)",
    "lost.",
]
STOPS = (".", " the", "\n", "zz", "a b", "e", "🙂")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["n", "on"],
    "additionalProperties": False,
}
REGEX = "(yes|no), [0-9]{1,3}[.]"
NEEDS_MODEL = frozenset(
    ("logprobs", "top_logprobs", "prompt_logprobs", "return_logprob", "echo", "regex", "json_schema")
)
ENDINGS = {"stop", "length", "abort", "deadline"}


@dataclass(frozen=True)
class Blow:
    """A request, how long its client stays, and what its answer must be like."""

    path: str
    body: dict[str, Any]
    is_bad: bool = False
    leaves_after_s: float | None = None
    is_aborted: bool = False


class Hammer:
    """Draws requests from a seed. Without a model there is nothing that asks for its distribution."""

    def __init__(self, seed: int, *, has_model: bool) -> None:
        self._rng = random.Random(seed)
        self._has_model = has_model
        self._numbers = 0

    def draw(self) -> Blow:
        """The next request."""
        rng = self._rng
        self._numbers += 1
        if rng.random() < 0.12:
            return self._bad()
        path = rng.choice((CHAT, COMPLETIONS, COMPLETIONS, NATIVE))
        body = {CHAT: self._chat, COMPLETIONS: self._completion, NATIVE: self._native}[path]()
        if not self._has_model:
            body = _without(NEEDS_MODEL, body)
        fate = rng.random()
        leaves_after_s = rng.choice((0.0, 0.02, 0.2, 0.6)) if fate < 0.15 else None
        return Blow(path, body, leaves_after_s=leaves_after_s, is_aborted=0.15 <= fate < 0.25)

    def _text(self, most: int = 40) -> str:
        return " ".join(self._rng.choices(WORDS, k=self._rng.randint(1, most)))

    def _sampling(self) -> dict[str, Any]:
        """Fields that all dialects share."""
        rng = self._rng
        choices: dict[str, Callable[[], Any]] = {
            "temperature": lambda: rng.choice((0, 0.7, 1.0, 1.9)),
            "top_p": lambda: rng.uniform(0.05, 1),
            "top_k": lambda: rng.choice((-1, 1, 5, 50)),
            "min_p": lambda: rng.uniform(0, 0.5),
            "presence_penalty": lambda: rng.uniform(-2, 2),
            "frequency_penalty": lambda: rng.uniform(-2, 2),
            "repetition_penalty": lambda: rng.uniform(0.8, 1.5),
            "logit_bias": lambda: {str(rng.randrange(49_000)): rng.uniform(-100, 100) for _ in range(3)},
            "seed": lambda: rng.randrange(2**40),
            "n": lambda: rng.choice((1, 2, 3)),
            "stop": lambda: rng.sample(STOPS, rng.randint(1, 3)),
            "stop_token_ids": lambda: [rng.randrange(49_000)],
            "ignore_eos": lambda: True,
            "skip_special_tokens": lambda: False,
            "include_stop": lambda: True,
        }
        body = {name: make() for name, make in choices.items() if rng.random() < 0.25}
        if rng.random() < 0.2:
            body |= rng.choice(({"regex": REGEX}, {"json_schema": SCHEMA}))
            body.pop("logit_bias", None)
        return body

    def _common(self) -> dict[str, Any]:
        rng = self._rng
        body = self._sampling() | {"max_tokens": rng.choice((1, 5, 20, 60, 150))}
        if rng.random() < 0.2:
            body["min_tokens"] = rng.randint(0, body["max_tokens"])
        if rng.random() < 0.1:
            body["deadline_s"] = rng.choice((0.05, 0.3, 2.0))
        if rng.random() < 0.3:
            body["priority"] = rng.randint(-3, 3)
        if rng.random() < 0.1:
            body["prompt_logprobs"] = rng.randint(0, 4)
        if rng.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | {"request_id": f"blow-{self._numbers}"}

    def _chat(self) -> dict[str, Any]:
        rng = self._rng
        roles = ("system", "user", "assistant", "user")[-rng.randint(1, 4) :]
        body = self._common() | {"messages": [{"role": role, "content": self._text()} for role in roles]}
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
        return body

    def _completion(self) -> dict[str, Any]:
        rng = self._rng
        prompts: tuple[Any, ...] = (
            self._text(150),
            [self._text() for _ in range(rng.randint(1, 4))],
            [rng.randrange(49_000) for _ in range(rng.randint(1, 50))],
        )
        body = self._common() | {"prompt": rng.choice(prompts)}
        if rng.random() < 0.3:
            body["logprobs"] = rng.randint(0, 5)
        if rng.random() < 0.2:
            body["echo"] = True
        return body

    def _native(self) -> dict[str, Any]:
        rng = self._rng
        params = self._sampling() | {"max_new_tokens": rng.choice((1, 8, 40, 100))}
        body: dict[str, Any] = {"sampling_params": params, "rid": f"blow-{self._numbers}"}
        body |= rng.choice(({"text": self._text()}, {"input_ids": [rng.randrange(49_000) for _ in range(9)]}))
        return body | {"stream": rng.random() < 0.5, "return_logprob": rng.random() < 0.5}

    def _bad(self) -> Blow:
        spoilers: tuple[dict[str, Any], ...] = (
            {"temperature": -1},
            {"max_tokens": 10**6},
            {"max_tokens": "many"},
            {"n": 0},
            {"stop": [""]},
            {"regex": "(unclosed"},
            {"json_schema": {"type": "nothing"}},
            {"regex": "a", "ebnf": "root ::= 'a'"},
            {"temprature": 1},
            {"prompt": []},
            {"prompt": [10**9]},
            {"model": "another"},
            {"logit_bias": {"x": 1}},
            {"prompt": "word " * 9000},
        )
        return Blow(COMPLETIONS, {"prompt": "fine", "max_tokens": 4} | self._rng.choice(spoilers), is_bad=True)


def _without(names: frozenset[str], body: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in body.items() if name not in names}
    return {name: _without(names, value) if isinstance(value, dict) else value for name, value in kept.items()}


def judge(blow: Blow, outcome: Outcome) -> str:
    """What kind of end this was. Raises AssertionError when the answer is not as it must be."""
    assert outcome.broken is None, outcome.broken
    if blow.is_bad:
        assert outcome.status in (400, 404), outcome.status
        assert set(outcome.error) == {"message", "type", "param", "code"} and outcome.error["message"]
        return "refused"
    if outcome.status == 503:
        assert outcome.error["code"] == "queue_full" and int(outcome.headers["retry-after"]) >= 1
        return "queue full"
    assert outcome.status == 200, outcome.text
    if blow.path == NATIVE:
        _judge_native(blow, outcome)
    else:
        _judge_openai(blow, outcome)
    return "stream" if blow.body.get("stream") else "whole"


def _judge_openai(blow: Blow, outcome: Outcome) -> None:
    body, is_chat = blow.body, blow.path == CHAT
    prompt = body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1
    num_choices = num_prompts * body.get("n", 1)
    texts: dict[int, str] = dict.fromkeys(range(num_choices), "")
    endings: dict[int, str] = {}
    num_logprobs: Counter[int] = Counter()
    if body.get("stream"):
        *chunks, done = outcome.events
        assert done == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
    else:
        chunks = [json.loads(outcome.text)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in endings, "something followed the finish reason"
            said = choice.get("message") or choice.get("delta") or choice
            texts[index] += said.get("content" if is_chat else "text") or ""
            found = choice["logprobs"]
            num_logprobs[index] += len(found["content"] if is_chat else found["tokens"]) if found else 0
            if choice["finish_reason"] is not None:
                endings[index] = choice["finish_reason"]
    assert sorted(endings) == list(range(num_choices)), endings
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] <= num_choices * body["max_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    asked_logprobs = body.get("logprobs") not in (None, False)
    if asked_logprobs and not body.get("echo"):
        assert sum(num_logprobs.values()) == usage["completion_tokens"]
    for index, ending in endings.items():
        _judge_text(body, texts[index], ending)


def _judge_native(blow: Blow, outcome: Outcome) -> None:
    params = blow.body["sampling_params"]
    n = params.get("n", 1)
    if blow.body["stream"]:
        *events, done = events_in(outcome.text)
        assert done == "[DONE]"
        last = {event.get("index", 0): event for event in events}
    else:
        found = json.loads(outcome.text)
        last = dict(enumerate(found if n > 1 else [found]))
    assert sorted(last) == list(range(n))
    for answer in last.values():
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == len(answer["output_ids"]) <= params["max_new_tokens"]
        if blow.body.get("return_logprob"):
            assert [token_id for _, token_id, _ in meta["output_token_logprobs"]] == answer["output_ids"]
        _judge_text(params, answer["text"], meta["finish_reason"]["type"])


def _judge_text(asked: dict[str, Any], text: str, ending: str) -> None:
    assert ending in ENDINGS, ending
    if not asked.get("include_stop") and not asked.get("min_tokens") and not asked.get("echo"):
        met = [stop for stop in asked.get("stop", ()) if stop in text]
        assert not met, f"the stop string {met} is in {text!r}"
    ended_by_grammar = ending == "stop" and not {"stop", "stop_token_ids", "echo"} & set(asked)
    if "regex" in asked and ended_by_grammar and asked.get("skip_special_tokens", True):
        assert re.fullmatch(REGEX, text), text
    if "json_schema" in asked and ended_by_grammar and asked.get("skip_special_tokens", True):
        jsonschema.validate(json.loads(text), SCHEMA)


@dataclass
class Tally:
    """How the blows ended."""

    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def strike(url: str, seed: int, seconds: float, *, at_least: int = 0, has_model: bool = True) -> Tally:
    """Random requests for this long, and until there were `at_least` so many; stops at the first wrong answer."""
    hammer, tally = Hammer(seed, has_model=has_model), Tally()
    until_s = time.monotonic() + seconds

    async def client(asker: Asker) -> None:
        while not tally.wrong and (time.monotonic() < until_s or tally.endings.total() < at_least):
            blow = hammer.draw()
            try:
                tally.endings[await _land(asker, blow)] += 1
            except Exception as error:
                tally.wrong.append(f"{type(error).__name__}: {error}\nafter {blow}")

    async with asking(url) as asker:
        await asyncio.gather(*(client(asker) for _ in range(NUM_CLIENTS)))
    return tally


async def _land(asker: Asker, blow: Blow) -> str:
    asked = asker.start(blow.body, blow.path)
    if blow.leaves_after_s is not None:
        await asyncio.sleep(blow.leaves_after_s)
        await asked.hang_up()
        return "left"
    if blow.is_aborted:
        request_id = blow.body.get("request_id") or blow.body.get("rid")
        answer = await asker.http.post("/abort_request", json={"rid": request_id})
        assert answer.status_code == 200, answer.text
    return judge(blow, await asked.outcome(120))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    tally = asyncio.run(strike(given.url, given.seed, given.seconds))
    print(f"seed {given.seed}: {dict(tally.endings)}")
    raise SystemExit("\n".join(tally.wrong) or 0)


if __name__ == "__main__":
    main()
