"""Who is asked: a server over HTTP, an engine in this process, many questions at once; and their failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gate_model import write_tiny_gguf
from scripted_respondents import ScriptedServer, scripted_server

from lockstep.ci.gates.asking import EngineRespondent, Reply, ServerRespondent, ask_all
from lockstep.core.errors import ConfigError, EngineDead
from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM

pytestmark = pytest.mark.suite("cpu", seconds=8)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server(lambda question: question.upper()) as running:
        yield running


def asked(respondent: Any, prompts: list[str], *, concurrency: int = 4) -> list[Reply]:
    replies = dict(ask_all(respondent, prompts, concurrency=concurrency, max_tokens=7, stop="Question:"))
    return [replies[index] for index in range(len(prompts))]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_server_is_asked_for_the_likeliest_completion(server: ScriptedServer, ending: str) -> None:
    respondent = ServerRespondent(server.url + ending)
    assert respondent.name == "small"
    assert asked(respondent, ["Question: a", "Question: b"], concurrency=1) == [
        Reply("A", False),
        Reply("B", False),
    ]
    assert server.bodies[0] == {
        "model": "small",
        "prompt": "Question: a",
        "max_tokens": 7,
        "temperature": 0,
        "stop": ["Question:"],
    }


def test_so_many_questions_are_under_way_at_once(server: ScriptedServer) -> None:
    server.pause_s = 0.05
    prompts = [f"Question: {number}" for number in range(12)]
    replies = asked(ServerRespondent(server.url, model="large"), prompts, concurrency=4)
    assert [reply.text for reply in replies] == [str(number) for number in range(12)]
    assert server.most_at_once == 4 and {body["model"] for body in server.bodies} == {"large"}


def test_an_answer_that_was_cut_says_so(server: ScriptedServer) -> None:
    server.reply = {"choices": [{"text": "#### 1", "finish_reason": "length"}]}
    assert asked(ServerRespondent(server.url), ["Question: a"]) == [Reply("#### 1", True)]


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_failed_question_ends_the_evaluation(server: ScriptedServer, status: int) -> None:
    """It is no wrong answer: the share would look worse than the model is."""
    respondent = ServerRespondent(server.url)
    server.failure = status
    with pytest.raises(EngineDead, match=f"status {status}: .*the queue is full"):
        asked(respondent, ["Question: a"] * 50, concurrency=1)
    assert len(server.bodies) < 50


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": None}])
def test_a_reply_of_another_shape(server: ScriptedServer, reply: dict[str, Any]) -> None:
    respondent = ServerRespondent(server.url)
    server.reply = {"object": "x", **reply}
    with pytest.raises(EngineDead, match="sent no completion"):
        asked(respondent, ["Question: a"])


def test_keys(server: ScriptedServer) -> None:
    server.api_key = "secret"
    assert ServerRespondent(server.url, api_key="secret").name == "small"
    with pytest.raises(ConfigError, match=r"wrong key.*LOCKSTEP_API_KEY"):
        ServerRespondent(server.url)


def test_addresses_and_names_that_are_wrong(server: ScriptedServer) -> None:
    with pytest.raises(ConfigError, match=r"no OpenAI-compatible server answers at .*/nowhere/v1: status 404"):
        ServerRespondent(f"{server.url}/nowhere")
    with pytest.raises(ConfigError, match=r"serves no model medium \(it serves: small, large\)"):
        ServerRespondent(server.url, model="medium")
    with pytest.raises(ConfigError, match="no OpenAI-compatible server answers"):
        ServerRespondent("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="no OpenAI-compatible server answers"):
        ServerRespondent("nonsense")


class Failing:
    """Fails at its third question; the others take a moment."""

    name = "failing"

    def __init__(self) -> None:
        self.num_asked = 0
        self._lock = threading.Lock()

    def ask(self, prompt: str, *, max_tokens: int, stop: str) -> Reply:
        with self._lock:
            self.num_asked += 1
            number = self.num_asked
        if number == 3:
            raise EngineDead("gone")
        time.sleep(0.01)
        return Reply("", False)


def test_after_a_failure_nothing_more_is_asked() -> None:
    respondent = Failing()
    with pytest.raises(EngineDead, match="gone"):
        asked(respondent, ["?"] * 1000, concurrency=2)
    assert respondent.num_asked < 20


def test_an_engine_in_this_process(tmp_path: Path) -> None:
    """Asked from many threads, it answers each prompt as it does alone."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    prompts = [f"Question: {'ab' * number}" for number in range(9)]
    with LLM(str(path), dtype="float32", threads=1, max_total_tokens=2048) as llm:
        respondent = EngineRespondent(llm)
        replies = asked(respondent, prompts, concurrency=4)
        alone = [llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=7))[0] for prompt in prompts]
        assert respondent.name == llm.card.name
    assert [reply.text for reply in replies] == [completion.text for completion in alone]
    assert [reply.cut for reply in replies] == [one.finish_reason == "length" for one in alone]
    assert any(reply.cut for reply in replies)
